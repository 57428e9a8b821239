"""/v1/responses: the official client against it, its events, and what it refuses."""

import json
from typing import Any

import pytest
from openai.types.responses import ResponseCompletedEvent, ResponseTextDeltaEvent

from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running, wait_until

RESPONSES = "/v1/responses"


def post(server: RunningServer, **fields: object) -> Any:
    response = server.shared_http.post(RESPONSES, json={"model": MODEL_NAME, "input": "Hi", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(server: RunningServer) -> str:
    return server.engine.decode(server.engine.requests[-1].prompt_ids)


def test_the_official_client_reads_the_answer(server: RunningServer) -> None:
    response = server.openai().responses.create(model=MODEL_NAME, input="Hi", store=False, metadata={"a": "b"})
    assert (response.output_text, response.status, response.error) == (ANSWER, "completed", None)
    assert response.metadata == {"a": "b"}
    assert response.usage is not None
    assert response.usage.output_tokens == len(server.engine.answer_ids) + 1
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    details = response.usage.input_tokens_details
    assert (details.cached_tokens, details.cache_write_tokens) == (1, 0)


def test_the_official_client_reads_the_stream(server: RunningServer) -> None:
    events = list(server.openai().responses.create(model=MODEL_NAME, input="Hi", stream=True))
    assert "".join(event.delta for event in events if isinstance(event, ResponseTextDeltaEvent)) == ANSWER
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert isinstance(last, ResponseCompletedEvent)
    assert last.response.output_text == ANSWER
    assert last.response.usage is not None


def test_the_stream_helper_assembles_the_response(server: RunningServer) -> None:
    with server.openai().responses.stream(model=MODEL_NAME, input="Hi") as stream:
        final = stream.get_final_response()
    assert final.output_text == ANSWER


def test_events_come_in_the_documented_order_under_their_names(server: RunningServer) -> None:
    text = server.shared_http.post(RESPONSES, json={"model": MODEL_NAME, "input": "Hi", "stream": True}).text
    names = [event.split("\n")[0].removeprefix("event: ") for event in text.split("\n\n")[:-1]]
    types = [json.loads(event.split("data: ")[1])["type"] for event in text.split("\n\n")[:-1]]
    assert names == types
    assert [name for name in names if name != "response.output_text.delta"] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_cut_by_its_limit_is_incomplete(server: RunningServer, stream: bool) -> None:
    client = server.openai()
    if stream:
        *_, last = client.responses.create(model=MODEL_NAME, input="Hi", max_output_tokens=3, stream=True)
        assert last.type == "response.incomplete"
        response = last.response
    else:
        response = client.responses.create(model=MODEL_NAME, input="Hi", max_output_tokens=3)
    assert response.status == response.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_instructions_and_earlier_output_are_the_conversation(server: RunningServer) -> None:
    first = post(server, instructions="Be brief.")
    assert prompt_of(server) == "<system>Be brief.\n<user>Hi\n<assistant>"
    turn = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And?"}]}
    post(server, input=[{"role": "user", "content": "Hi"}, *first["output"], turn])
    assert prompt_of(server) == f"<user>Hi\n<assistant>{ANSWER}\n<user>And?\n<assistant>"


@pytest.mark.parametrize(
    ("instructions", "begins"),
    [("Be brief.", "<system>Be brief.\n\nBe kind.\n\nBe fair.\n"), (None, "<system>Be kind.\n\nBe fair.\n")],
)
def test_instructions_and_the_messages_of_developers_are_one_system_message(
    server: RunningServer, instructions: str | None, begins: str
) -> None:
    """Codex sends instructions and developer messages; many templates allow one system message, at the beginning."""
    leading = [{"role": "developer", "content": "Be kind."}, {"role": "system", "content": "Be fair."}]
    later = [{"role": "user", "content": "Hi"}, {"role": "developer", "content": "Be quick."}]
    post(server, instructions=instructions, input=[*leading, *later])
    assert prompt_of(server) == f"{begins}<user>Hi\n<system>Be quick.\n<assistant>"


def test_sampling_fields_reach_the_engine(server: RunningServer) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 5,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "min_tokens": 1, "ignore_eos": True,
    }  # fmt: skip
    body = post(server, **fields, stop="x", logit_bias={"5": 1}, max_output_tokens=9, block_length=4, cache_salt="mine")
    request = server.engine.requests[-1]
    assert {name: getattr(request.params, name) for name in fields} == fields
    assert (request.params.stop, request.params.logit_bias) == (("x",), {5: 1})
    shown = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "max_output_tokens")
    assert {name: body[name] for name in shown} == {name: fields.get(name, 9) for name in shown}
    assert (request.params.max_tokens, request.params.block_length, request.cache_salt) == (9, 4, "mine")


def test_a_dead_worker_ends_the_stream_in_a_failed_response() -> None:
    with running(ScriptedEngine(endless=True, step_seconds=0.01)) as server:
        body = {"model": MODEL_NAME, "input": "Hi", "stream": True}
        with server.shared_http.stream("POST", RESPONSES, json=body) as response:
            wait_until(lambda: server.engine.num_open == 1)
            server.in_loop(server.engine.kill_worker)
            text = response.read().decode()
    last = json.loads(text.split("\n\n")[-2].split("data: ")[1])
    response = last["response"]
    assert (last["type"], response["status"], response["error"]["code"]) == (
        "response.failed", "failed", "server_error",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"type": "web_search_call", "id": "ws_1", "status": "completed"}]}, "input"),
        ({"input": [{"type": 5}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content"),
        ({"input": "x" * 600}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"n": 2}, "n"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex"),
        ({"text": {"format": {"type": "json_object"}}, "response_format": {"type": "text"}}, "response_format"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"effort": "utmost"}}, "reasoning.effort"),
        ({"model": "other"}, "model"),
    ],
    ids=str,
)
def test_what_is_not_served_is_named(server: RunningServer, fields: dict[str, object], param: str) -> None:
    response = server.shared_http.post(RESPONSES, json={"model": MODEL_NAME, "input": "Hi", **fields})
    assert response.status_code == (404 if param == "model" else 400), response.text
    assert response.json()["error"]["param"] == param
