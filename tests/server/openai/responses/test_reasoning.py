"""Reasoning in /v1/responses: items of its own, streamed, counted, summarised on request and read when sent back."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.responses import Response

from tests.server.fakes import MODEL_NAME
from tests.server.harness import RunningServer, running
from tests.server.openai.chat.test_reasoning import CALL, SAID, THOUGHT, WRITTEN, make_engine, num_tokens
from tests.server.openai.responses.test_sdk_models import EVENT, check, data_of, without_ids

RESPONSES = "/v1/responses"
SUMMARY = {"reasoning": {"summary": "auto"}}


@pytest.fixture(scope="module")
def thinker() -> Iterator[RunningServer]:
    with running(make_engine(WRITTEN)) as server:
        yield server


def post(server: RunningServer, **fields: object) -> Any:
    answer = server.shared_http.post(RESPONSES, json={"model": MODEL_NAME, "input": "Hi", **fields})
    assert answer.status_code == 200, answer.text
    response = Response.model_validate_json(answer.content, strict=True)
    check(response)
    return response


def test_what_the_model_thinks_is_an_item_before_its_answer(thinker: RunningServer) -> None:
    response = post(thinker)
    thought, message = response.output
    assert (thought.type, thought.summary, thought.content[0].text) == ("reasoning", [], THOUGHT)
    assert (message.type, response.output_text) == ("message", SAID)
    behind = num_tokens(thinker, f"\n\n{SAID}") + 1
    assert response.usage.output_tokens_details.reasoning_tokens == response.usage.output_tokens - behind


def test_a_summary_is_the_whole_of_it(thinker: RunningServer) -> None:
    thought = post(thinker, **SUMMARY).output[0]
    assert (thought.summary[0].text, thought.content) == (THOUGHT, None)


@pytest.mark.parametrize(
    ("fields", "kinds", "delta"),
    [
        ({}, ["content_part.added", "reasoning_text.done", "content_part.done"], "reasoning_text.delta"),
        (
            SUMMARY,
            ["reasoning_summary_part.added", "reasoning_summary_text.done", "reasoning_summary_part.done"],
            "reasoning_summary_text.delta",
        ),
    ],
)
def test_reasoning_streams_in_events_of_its_own(
    thinker: RunningServer, fields: dict[str, object], kinds: list[str], delta: str
) -> None:
    body = {"model": MODEL_NAME, "input": "Hi", "stream": True, **fields}
    events = [EVENT.validate_python(data) for data in data_of(thinker.shared_http.post(RESPONSES, json=body))]
    for event in events:
        check(event)
    names = [event.type.removeprefix("response.") for event in events]
    assert "".join(event.delta for event in events if event.type == f"response.{delta}") == THOUGHT
    begun, _, done = kinds
    of_item = names[names.index(begun) - 1 : names.index(done) + 2]
    assert [name for name in of_item if name != delta] == ["output_item.added", *kinds, "output_item.done"]
    whole = post(thinker, **fields).model_dump(mode="json")
    assert without_ids(events[-1].response.model_dump(mode="json")) == without_ids(whole)


def test_an_answer_cut_while_the_model_thinks_has_no_message(thinker: RunningServer) -> None:
    response = post(thinker, max_output_tokens=16)
    assert [(item.type, item.status) for item in response.output] == [("reasoning", "incomplete")]


@pytest.mark.parametrize("fields", [{}, SUMMARY], ids=["content", "summary"])
@pytest.mark.parametrize("stored", [True, False])
def test_reasoning_reaches_templates_that_write_it(
    thinker: RunningServer, fields: dict[str, object], stored: bool
) -> None:
    first = post(thinker, **fields)
    if stored:
        post(thinker, previous_response_id=first.id, input="And?")
    else:
        history = [{"role": "user", "content": "Hi"}, *first.model_dump()["output"]]
        post(thinker, input=[*history, {"role": "user", "content": "And?"}])
    prompt = thinker.engine.decode(thinker.engine.requests[-1].prompt_ids)
    assert prompt == f"<user>Hi<assistant><think>{THOUGHT}</think>{SAID}<user>And?<assistant>"


def test_reasoning_before_a_call_is_part_of_the_calls_message(thinker: RunningServer) -> None:
    call = {"type": "function_call", "call_id": "c", "name": CALL.name, "arguments": CALL.arguments}
    thought = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": THOUGHT}]}
    result = {"type": "function_call_output", "call_id": "c", "output": "noon"}
    post(thinker, input=[{"role": "user", "content": "Hi"}, thought, call, result])
    prompt = thinker.engine.decode(thinker.engine.requests[-1].prompt_ids)
    assert prompt.startswith(f"<user>Hi<assistant><think>{THOUGHT}</think><tool_call>")
