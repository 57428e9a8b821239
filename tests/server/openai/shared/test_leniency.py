"""What clients of all kinds send is answered; what has no effect is reported, or refused where the settings say so."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.http.ignored import IGNORED_FIELDS_HEADER
from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
USER: dict[str, object] = {"role": "user", "content": "Hi"}
CALL: dict[str, Any] = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL: dict[str, object] = {"type": "function", "function": {"name": "f"}}
CACHED = {"type": "ephemeral"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """With room for the description of tools in the prompt."""
    with running(ScriptedEngine(info=make_info(max_model_len=2048))) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def strict() -> Iterator[RunningServer]:
    with running(ScriptedEngine(), unknown_fields="refuse") as running_server:
        yield running_server


def ask(server: RunningServer, fields: Mapping[str, object], path: str = CHAT) -> tuple[dict[str, Any], str | None]:
    """The answer and the fields that it says are ignored."""
    prompts: dict[str, dict[str, object]] = {COMPLETIONS: {"prompt": "Hi"}, RESPONSES: {"input": "Hi"}}
    body = {"model": MODEL_NAME, **prompts.get(path, {"messages": [USER]}), **fields}
    response = server.shared_http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json(), response.headers.get(IGNORED_FIELDS_HEADER)


def prompt_of(server: RunningServer) -> str:
    return server.engine.decode(server.engine.requests[-1].prompt_ids)


FIELDS: list[tuple[dict[str, object], str | None]] = [
    ({"colour": "red"}, "colour"),
    ({"store": True}, "store"),
    ({"store": False}, None),
    ({"service_tier": "flex"}, "service_tier"),
    ({"service_tier": "auto", "user": "me", "metadata": {"a": "b"}, "prompt_cache_key": "x"}, None),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"skip_special_tokens": True, "length_penalty": 1.0, "early_stopping": False, "mirostat": 0}, None),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"spaces_between_special_tokens": False, "priority": 3}, "spaces_between_special_tokens, priority"),
    ({"length_penalty": 0.5, "mirostat": 2, "cache_prompt": False}, "length_penalty, mirostat, cache_prompt"),
    ({"messages": [{**USER, "cache_control": CACHED}]}, "messages.cache_control"),
    ({"messages": [{**USER, "provider_specific_fields": {"a": 1}}]}, "messages.provider_specific_fields"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": CACHED}]}]},
     "messages.content.cache_control"),
    ({"messages": [USER, {"role": "assistant", "content": "Yes", "finish_reason": "stop", "parsed": 1}, USER]}, None),
    ({"messages": [USER, {"role": "assistant", "content": "Yes", "reasoning_content": None}, USER]}, None),
    ({"messages": [USER, {"role": "assistant", "content": "Yes", "reasoning_content": "Hm"}, USER]},
     "messages.reasoning_content"),
    ({"tools": [{**TOOL, "cache_control": CACHED}]}, "tools.cache_control"),
    ({"tools": [TOOL, {"type": "web_search"}]}, "tools.web_search"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"a\r\nb: c": 1, "x" * 100: 1}, "a??b??c, " + "x" * 64),
    ({f"f{i}": 1 for i in range(30)}, ", ".join([f"f{i}" for i in range(20)] + ["and 10 more"])),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "ignored"), FIELDS, ids=lambda value: str(value)[:60])
def test_a_field_without_effect_is_reported_and_the_request_answered(
    server: RunningServer, fields: dict[str, object], ignored: str | None
) -> None:
    answer, reported = ask(server, fields)
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert reported == ignored


def test_a_stream_reports_them_before_it_begins(server: RunningServer) -> None:
    body = {"model": MODEL_NAME, "messages": [USER], "stream": True, "reasoning_effort": "low", "colour": "red"}
    with server.shared_http.stream("POST", CHAT, json=body) as response:
        assert response.headers[IGNORED_FIELDS_HEADER] == "colour, reasoning_effort"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"colour": "red"}, "colour"),
        ({"store": True}, "store"),
        ({"messages": [USER, {**USER, "colour": "red"}]}, "messages.1.colour"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "a": 1}]}]}, "messages.0.content.a"),
        ({"tools": [TOOL, {"type": "web_search"}]}, "tools.web_search"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json.uniqueItems"),
    ],
)
def test_where_the_settings_say_so_it_is_refused_by_its_place(
    strict: RunningServer, fields: dict[str, object], param: str
) -> None:
    response = strict.shared_http.post(CHAT, json={"model": MODEL_NAME, "messages": [USER], **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "unsupported_parameter")
    assert error["message"].startswith(f"{param}: ")
    assert IGNORED_FIELDS_HEADER not in response.headers


def test_a_strict_server_takes_what_asks_for_nothing(strict: RunningServer) -> None:
    assert ask(strict, {"store": False, "colour": None, "user": "me", "skip_special_tokens": True})[1] is None


def test_ignored_fields_can_be_ignored_silently() -> None:
    with capture_logs() as logs, running(ScriptedEngine(), unknown_fields="ignore") as server:
        assert ask(server, {"colour": "red"})[1] is None
    assert [entry for entry in logs if entry["event"] == "request field ignored"] == []


def test_each_ignored_field_is_logged_once_and_counted_under_bounded_labels() -> None:
    with capture_logs() as logs, running(ScriptedEngine()) as server:
        for colour in ("red", "blue"):
            ask(server, {"colour": colour, "store": True, f"made_up_{colour}": 1})
        metrics = server.shared_http.get("/metrics").text
    logged = [entry["field"] for entry in logs if entry["event"] == "request field ignored"]
    assert logged == ["colour", "store", "made_up_red", "made_up_blue"]
    counts = re.findall(r'cllm_ignored_fields_total{field="(\w+)",.*} (\S+)', metrics)
    assert sorted(counts) == [("other", "4.0"), ("store", "2.0")]


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ""}, {"stop": [""]}, {"max_tokens": 8.0}, {"logprobs": False, "top_logprobs": 0}, {"tools": None},
        {"response_format": {}}, {"tool_choice": ""}, {"logit_bias": {}}, {"stream_options": {}}, {"model": ""},
        {"model": None}, {"n": 1.0}, {"top_k": -1}, {"temperature": 5}, {"chat_template_kwargs": {}}, {"functions": []},
    ],
    ids=str,
)  # fmt: skip
def test_null_empty_and_whole_floats_are_taken_as_meant(server: RunningServer, fields: dict[str, object]) -> None:
    assert ask(server, fields)[1] is None


@pytest.mark.parametrize(
    ("path", "field"),
    [(CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (CHAT, "n_predict"), (COMPLETIONS, "max_tokens"),
     (COMPLETIONS, "n_predict"), (RESPONSES, "max_output_tokens")],
)  # fmt: skip
@pytest.mark.parametrize(("wanted", "given"), [(7, 7), (65536, "room"), (10**12, "room"), (-1, None), (8.0, 8)])
def test_a_limit_is_cut_to_the_room_behind_the_prompt(
    server: RunningServer, path: str, field: str, wanted: float, given: int | str | None
) -> None:
    ask(server, {field: wanted}, path)
    request = server.engine.requests[-1]
    room = server.engine.info.max_model_len - len(request.prompt_ids)
    assert request.params.max_tokens == (room if given == "room" else given)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_operators_can_limit_outputs(path: str) -> None:
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    with running(ScriptedEngine(), max_output_tokens=5) as server:
        for fields in ({}, {limit: 9}, {limit: -1}, {limit: 3}):
            ask(server, fields, path)
        assert [request.params.max_tokens for request in server.engine.requests] == [5, 5, 5, 3]


ASSISTANT: dict[str, object] = {"role": "assistant"}
CONVERSATIONS: list[tuple[list[dict[str, object]], str]] = [
    ([USER, {**ASSISTANT, "content": None}, USER], "<user>Hi\n<assistant>\n<user>Hi\n"),
    ([USER, {**ASSISTANT, "content": []}, USER], "<user>Hi\n<assistant>\n<user>Hi\n"),
    ([USER, {**ASSISTANT, "tool_calls": []}, USER], "<user>Hi\n<assistant>\n<user>Hi\n"),
    ([{"role": "user", "content": ""}], "<user>\n"),
    ([USER, {**ASSISTANT, "content": [{"type": "refusal", "refusal": "No."}]}, USER],
     "<user>Hi\n<assistant>No.\n<user>Hi\n"),
    ([USER, {**ASSISTANT, "content": None, "refusal": "No."}, USER], "<user>Hi\n<assistant>No.\n<user>Hi\n"),
    ([{"role": "tool", "tool_call_id": "gone", "content": "5"}, USER],
     "<user><tool_response>\n5\n</tool_response>\n<user>Hi\n"),
    ([{"role": "tool", "content": None}, USER], "<user><tool_response>\n\n</tool_response>\n<user>Hi\n"),
    ([USER, {**ASSISTANT, "function_call": {"name": "f", "arguments": "{}"}},
      {"role": "function", "name": "f", "content": "5"}],
     "<user>Hi\n<assistant><tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n"
     "<user><tool_response>\n5\n</tool_response>\n"),
    ([USER, {**ASSISTANT, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a": "cu'}}]}],
     "<user>Hi\n<assistant><tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"cu\"}}\n</tool_call>\n"),
    ([USER, {**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}],
     "<user>Hi\n<assistant><tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "prompt"), CONVERSATIONS, ids=str)
def test_conversations_are_read_as_they_happen(
    server: RunningServer, messages: list[dict[str, object]], prompt: str
) -> None:
    assert ask(server, {"messages": messages})[1] is None
    assert prompt_of(server) == prompt + "<assistant>"


def test_thoughts_in_content_are_no_part_of_what_was_said(server: RunningServer) -> None:
    said = [{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": "Yes"}]
    assert ask(server, {"messages": [USER, {"role": "assistant", "content": said}]})[1] == "messages.content.thinking"
    assert prompt_of(server) == "<user>Hi\n<assistant>Yes\n<assistant>"


def test_a_message_can_be_continued(server: RunningServer) -> None:
    said = {"role": "assistant", "content": "The sky "}
    ask(server, {"messages": [USER, said], "continue_final_message": True, "add_generation_prompt": False})
    assert prompt_of(server) == "<user>Hi\n<assistant>The sky "
    ask(server, {"add_generation_prompt": False})
    assert prompt_of(server) == "<user>Hi\n"


@pytest.mark.parametrize(
    ("schema", "ignored"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "not": {}, "if": {}}, "if, response_format.not"),
        ({"type": "string", "format": "no-such"}, "format"),
        ({"type": "string", "pattern": "^(?!x)y"}, "pattern"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"type": "object", "properties": {"pattern": {"const": {"pattern": "(?=a)"}}}}, None),
    ],
)
def test_what_cannot_be_enforced_of_a_schema_is_left_out_and_reported(
    server: RunningServer, schema: dict[str, object], ignored: str | None
) -> None:
    named = {"name": "x", "schema": schema}
    reported = [ask(server, {"response_format": {"type": "json_schema", "json_schema": named}})[1] for _ in range(2)]
    assert reported == [ignored and f"response_format.{ignored}"] * 2
    assert server.engine.requests[-1].params.grammar is not None


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_chunk_has_the_usage_so_far_on_request(server: RunningServer, path: str) -> None:
    prompt = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": [USER]}
    options = {"continuous_usage_stats": True}
    body = {"model": MODEL_NAME, **prompt, "stream": True, "stream_options": options, "max_tokens": 20}
    events = server.shared_http.post(path, json=body).text.split("\n\n")[:-2]
    usages = [data_of(event)["usage"]["completion_tokens"] for event in events]
    assert usages == sorted(usages)
    assert (usages[0] < usages[-1], usages[-2:]) == (True, [20, 20])


def data_of(event: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(event.removeprefix("data: "))
    return parsed


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_prompt_logprobs_come_as_vllm_has_them(server: RunningServer, path: str) -> None:
    answer, _ = ask(server, {"prompt_logprobs": 2}, path)
    found = answer["choices"][0]["prompt_logprobs"] if path == COMPLETIONS else answer["prompt_logprobs"]
    ids = server.engine.requests[-1].prompt_ids
    assert (len(found), found[0]) == (len(ids), None)
    for token_id, entries in zip(ids[1:], found[1:], strict=True):
        assert entries[str(token_id)].keys() == {"logprob", "rank", "decoded_token"}
        assert sorted(entry["rank"] for entry in entries.values() if entry["rank"] is not None) == [1, 2]


def test_deprecated_functions_are_called_in_their_own_form() -> None:
    written = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    body = {"model": MODEL_NAME, "messages": [USER], "functions": [function], "function_call": {"name": "f"}}
    with running(ScriptedEngine(written, info=make_info(max_model_len=2048))) as server:
        (choice,) = server.shared_http.post(CHAT, json=body).json()["choices"]
        assert choice["finish_reason"] == "function_call"
        assert choice["message"]["function_call"] == {"name": "f", "arguments": '{"a": 1}'}
        assert "tool_calls" not in choice["message"]
        events = server.shared_http.post(CHAT, json={**body, "stream": True}).text.split("\n\n")[:-2]
    deltas = [data_of(event)["choices"][0] for event in events]
    calls = [choice["delta"]["function_call"] for choice in deltas if "function_call" in choice["delta"]]
    assert calls[0] == {"name": "f", "arguments": ""}
    assert "".join(call["arguments"] for call in calls) == '{"a": 1}'
    assert deltas[-1]["finish_reason"] == "function_call"
