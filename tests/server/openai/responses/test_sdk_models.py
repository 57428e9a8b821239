"""Answers and events have every field of the official models, and no others."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.fakes import MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running, wait_until
from tests.server.openai.responses.test_tools import TIME, WEATHER, WRITTEN

RESPONSES = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

# That other servers and OpenAI's own answers have, but not its package.
EXTENSIONS = {"store", "presence_penalty", "frequency_penalty"}

BODIES: dict[str, dict[str, object]] = {
    "text": {},
    "cut": {"max_output_tokens": 3},
    "logprobs": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "calls": {"tools": [WEATHER, TIME], "instructions": "Be brief.", "store": False},
    "allowed": {
        "tools": [WEATHER, TIME],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]},
    },
    "format": {
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": False}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "metadata": {"a": "b"},
        "user": "me",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "prompt_cache_retention": "24h",
        "max_tool_calls": 3,
    },
}

every_body = pytest.mark.parametrize("fields", BODIES.values(), ids=BODIES)


@pytest.fixture(scope="module")
def caller() -> Iterator[RunningServer]:
    with running(ScriptedEngine(f"So.\n{WRITTEN}", info=make_info(max_model_len=4096))) as server:
        yield server


def check(model: pydantic.BaseModel) -> None:
    """Fail where a model or one within it has a field that its class has not."""
    assert not (model.model_extra or {}).keys() - EXTENSIONS, type(model)
    for value in dict(model).values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, pydantic.BaseModel):
                check(part)


@every_body
def test_a_whole_answer_is_a_response_of_the_official_package(caller: RunningServer, fields: dict[str, object]) -> None:
    answer = caller.shared_http.post(RESPONSES, json={"model": MODEL_NAME, "input": "Hi", **fields})
    assert answer.status_code == 200, answer.text
    response = Response.model_validate_json(answer.content, strict=True)
    check(response)
    assert response.model_fields_set >= Response.model_fields.keys()


@every_body
def test_every_event_is_one_of_the_official_package(caller: RunningServer, fields: dict[str, object]) -> None:
    body = {"model": MODEL_NAME, "input": "Hi", "stream": True, **fields}
    events = list(map(EVENT.validate_python, data_of(caller.shared_http.post(RESPONSES, json=body))))
    for event in events:
        check(event)
    whole = caller.shared_http.post(RESPONSES, json={**body, "stream": False}).json()
    assert without_ids(events[-1].response.model_dump(mode="json", by_alias=True)) == without_ids(whole)


def data_of(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: ")]


def without_ids(value: Any) -> Any:
    """The value without what differs between two answers."""
    if isinstance(value, dict):
        kept = {name: without_ids(part) for name, part in value.items() if part is not None}
        return {
            name: part for name, part in kept.items() if name not in ("id", "call_id", "created_at", "completed_at")
        }
    return [without_ids(part) for part in value] if isinstance(value, list) else value


def test_a_failed_response_is_one_of_the_official_package() -> None:
    with running(ScriptedEngine(endless=True, step_seconds=0.01)) as server:
        body = {"model": MODEL_NAME, "input": "Hi", "stream": True}
        with server.shared_http.stream("POST", RESPONSES, json=body) as response:
            wait_until(lambda: server.engine.num_open == 1)
            server.in_loop(server.engine.kill_worker)
            response.read()
        last = EVENT.validate_python(data_of(response)[-1])
    check(last)
    assert (last.type, last.response.error.code) == ("response.failed", "server_error")
    assert "SIGKILL" in last.response.error.message


def test_logprobs_are_those_of_the_text(server: RunningServer) -> None:
    body = {"model": MODEL_NAME, "input": "Hi", **BODIES["logprobs"]}
    part = server.shared_http.post(RESPONSES, json=body).json()["output"][0]["content"][0]
    spelled = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"])
    assert spelled.decode() == part["text"]
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {2}
    events = data_of(server.shared_http.post(RESPONSES, json={**body, "stream": True}))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    told = [entry["token"] for event in deltas for entry in event["logprobs"]]
    assert told == [entry["token"] for entry in part["logprobs"]]


def test_log_probabilities_that_are_not_included_are_reported(server: RunningServer) -> None:
    answer = server.shared_http.post(RESPONSES, json={"model": MODEL_NAME, "input": "Hi", "top_logprobs": 2})
    assert answer.headers["x-ignored-fields"] == "top_logprobs"
    assert answer.json()["output"][0]["content"][0]["logprobs"] == []
