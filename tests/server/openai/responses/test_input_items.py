"""Items in the forms in which clients send them; what this server cannot read is skipped and reported."""

from collections.abc import Iterator
from typing import Any

import pytest

from server.openai.responses.input_items import HOSTED_ITEMS
from tests.server.fakes import MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running

RESPONSES = "/v1/responses"
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(ScriptedEngine(info=make_info(max_model_len=4096))) as server:
        yield server


def post(server: RunningServer, items: list[Any], **fields: object) -> Any:
    response = server.shared_http.post(RESPONSES, json={"model": MODEL_NAME, "input": items, **fields})
    assert response.status_code == 200, response.text
    return response


def prompt_of(server: RunningServer) -> str:
    return server.engine.decode(server.engine.requests[-1].prompt_ids)


@pytest.mark.parametrize(
    "item",
    [
        {"role": "assistant", "content": "Yes."},
        {"type": "message", "role": "assistant", "content": [{"type": "input_text", "text": "Yes."}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "phase": None, "status": None,
         "content": [{"type": "output_text", "text": "Yes.", "annotations": [], "logprobs": None}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "phase": "final_answer", "status": "completed",
         "content": [{"type": "output_text", "text": "Yes.", "logprobs": [{"token": "Yes"}], "annotations": [{}]}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "Yes."}]},
    ],
    ids=str,
)  # fmt: skip
def test_an_earlier_answer_is_read_in_every_form(server: RunningServer, item: dict[str, Any]) -> None:
    response = post(server, [USER, item, USER])
    assert prompt_of(server) == "<user>Hi\n<assistant>Yes.\n<user>Hi\n<assistant>"
    assert "x-ignored-fields" not in response.headers


CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "5"}
CALLED = (
    '<user>Hi\n<assistant><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
    "<user><tool_response>\n5\n</tool_response>\n<assistant>"
)


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (CALL, RESULT),
        ({**CALL, "id": "fc_1", "status": "completed", "namespace": None, "caller": None, "async_": None}, RESULT),
        ({**CALL, "namespace": "n", "caller": {"type": "direct"}, "async": False, "parsed_arguments": {}}, RESULT),
        (CALL, {**RESULT, "id": None, "status": None, "output": [{"type": "input_text", "text": "5"}]}),
        (CALL, {**RESULT, "id": "fco_1", "output": [{"type": "output_text", "text": "5"}]}),
    ],
    ids=str,
)
def test_calls_and_results_are_read_in_every_form(
    server: RunningServer, call: dict[str, Any], result: dict[str, Any]
) -> None:
    response = post(server, [USER, call, result])
    assert prompt_of(server) == CALLED
    assert "x-ignored-fields" not in response.headers


@pytest.mark.parametrize("kind", sorted(HOSTED_ITEMS))
def test_items_of_tools_that_are_not_here_are_skipped_and_reported(server: RunningServer, kind: str) -> None:
    response = post(server, [USER, {"type": kind, "id": "x_1", "status": "completed"}])
    assert prompt_of(server) == "<user>Hi\n<assistant>"
    assert response.headers["x-ignored-fields"] == f"input.{kind}"


def test_encrypted_reasoning_is_reported_and_skipped(server: RunningServer) -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"}
    response = post(server, [USER, item, {"role": "assistant", "content": "Yes."}, USER])
    assert prompt_of(server) == "<user>Hi\n<assistant>Yes.\n<user>Hi\n<assistant>"
    assert response.headers["x-ignored-fields"] == "input.encrypted_content"


@pytest.mark.parametrize(
    "kind",
    ["web_search", "file_search", "mcp", "custom", "local_shell", "apply_patch", "image_generation", "namespace"],
)
def test_tools_of_other_types_are_skipped_and_reported(server: RunningServer, kind: str) -> None:
    tools = [{"type": kind, "name": "x"}, {"type": "function", "name": "f", "parameters": None, "strict": None}]
    response = post(server, [USER], tools=tools, tool_choice="auto", max_output_tokens=2)
    assert response.headers["x-ignored-fields"] == f"tools.{kind}"
    assert [tool["name"] for tool in response.json()["tools"]] == ["f"]


def test_what_codex_sends_along_is_taken(server: RunningServer) -> None:
    response = post(
        server, [USER], client_metadata={"turn_id": "t"}, include=["reasoning.encrypted_content"], store=False,
        prompt_cache_key="k", reasoning={"summary": "auto"}, parallel_tool_calls=True, tool_choice="auto",
    )  # fmt: skip
    assert response.headers["x-ignored-fields"] == "include.reasoning.encrypted_content"
    assert response.json()["prompt_cache_key"] == "k"
