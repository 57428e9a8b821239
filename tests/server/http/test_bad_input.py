"""Each malformed request gets its 4xx with an OpenAI error object, and the server goes on."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MAX_BODY_BYTES = 200_000
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "Hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
CALL: dict[str, object] = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(ScriptedEngine(), max_body_bytes=MAX_BODY_BYTES, max_choices=8) as running_server:
        yield running_server


def assert_error(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The error object, which must be whole, after which the server must still answer."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["param"] == param
    assert response.headers["x-request-id"]
    return dict(error)


def assert_alive(server: RunningServer, http: httpx.Client) -> None:
    answer = http.post(CHAT, json={"model": MODEL_NAME, "messages": [USER]})
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER
    assert server.in_loop(lambda: server.engine.num_open) == 0


def called(**changes: object) -> dict[str, object]:
    """An answer that called a function."""
    function = {"name": "f", "arguments": "{}", **changes}
    return {"role": "assistant", "tool_calls": [{**CALL, "function": function}]}


def tool(name: str = "f", **changes: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, **changes}}


def choice(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, name: str) -> dict[str, object]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [choice(name)]}}


CHAT_FIELDS: list[tuple[dict[str, object], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": ["Hi"]}, "messages.0"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
    ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages"),
    ({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, "messages.0"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages.0.tool_calls.0.function"),
    ({"messages": [called(arguments=["x"])]}, "messages.0.tool_calls.0.function.arguments"),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}]}, "messages.0.tool_calls.0.type"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 10**30}, "n"),
    ({"seed": 2**70}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"max_tokens": 8.5}, "max_tokens"),
    ({"n_predict": 0}, "n_predict"),
    ({"top_k": -2}, "top_k"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"messages": [{"role": "assistant"}], "continue_final_message": True}, "continue_final_message"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"logit_bias": {"hello": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": {"include_draft": 1}}, "stream_options.include_draft"),
    ({"block_length": 0}, "block_length"),
    ({"prediction": {"type": "other", "content": "x"}}, "prediction.type"),
    ({"prediction": {"type": "content", "content": "x" * 600}}, "prediction"),
    ({"prediction": {"type": "content", "content": 5}}, "prediction.content"),
    ({"prediction": {"type": "content", "content": [IMAGE]}}, "prediction.content"),
    ({"tools": 5}, "tools"),
    ({"tools": [5]}, "tools.0"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [tool(), tool("g"), tool()]}, "tools"),
    ({"tools": [tool("a b")]}, "tools.0.function.name"),
    ({"tools": [tool("f" * 65)]}, "tools.0.function.name"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools.0.function.parameters"),
    ({"tools": [tool(parameters=[])]}, "tools.0.function.parameters"),
    ({"tools": [tool(str(i)) for i in range(129)]}, "tools"),
    ({"tools": [tool(description="x" * 131_072)]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "required", "tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tool_choice"),
    ({"functions": [{}]}, "functions.0.name"),
    ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
    ({"functions": [{"name": "f"}], "function_call": "always"}, "function_call"),
    ({"tool_choice": "always", "tools": [tool()]}, "tool_choice"),
    ({"tool_choice": {"type": "custom"}, "tools": [tool()]}, "tool_choice"),
    ({"tool_choice": choice("g"), "tools": [tool()]}, "tool_choice"),
    ({"tool_choice": choice("f")}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {}}, "tools": [tool()]}, "tool_choice.function.name"),
    ({"tool_choice": allowed("maybe", "f"), "tools": [tool()]}, "tool_choice.allowed_tools.mode"),
    ({"tool_choice": allowed("auto", "g"), "tools": [tool()]}, "tool_choice"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
    ({"guided_json": 3}, "guided_json"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"reasoning_effort": "utmost"}, "reasoning_effort"),
    ({"guided_json": "{}}"}, "guided_json"),
    ({"model": 5}, "model"),
]

COMPLETION_FIELDS: list[tuple[dict[str, object], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [5, -1]}, "prompt"),
    ({"prompt": [99999999]}, "prompt"),
    ({"prompt": ["x"] * 9}, "n"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 9}, "n"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"suffix": "end", "prompt": [5]}, "suffix"),
    ({"suffix": 5}, "suffix"),
    ({"suffix": "end", "echo": True, "logprobs": 1}, "suffix"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), CHAT_FIELDS, ids=str)
def test_a_bad_chat_field_is_named(server: RunningServer, fields: dict[str, object], param: str) -> None:
    with server.http() as http:
        response = http.post(CHAT, json={"model": MODEL_NAME, "messages": [USER], **fields})
        error = assert_error(response, 400, param)
        assert error["type"] == "invalid_request_error"
        assert_alive(server, http)


@pytest.mark.parametrize(("fields", "param"), COMPLETION_FIELDS, ids=str)
def test_a_bad_completion_field_is_named(server: RunningServer, fields: dict[str, object], param: str) -> None:
    with server.http() as http:
        assert_error(http.post(COMPLETIONS, json={"model": MODEL_NAME, "prompt": "Hi", **fields}), 400, param)
        assert_alive(server, http)


RESPONSE_FIELDS: list[tuple[dict[str, object], str]] = [
    ({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]}, "input.0.arguments"),
]


@pytest.mark.parametrize(("fields", "param"), RESPONSE_FIELDS, ids=str)
def test_a_bad_response_field_is_named(server: RunningServer, fields: dict[str, object], param: str) -> None:
    with server.http() as http:
        assert_error(http.post(RESPONSES, json={"model": MODEL_NAME, "input": "Hi", **fields}), 400, param)


def test_what_is_not_served_is_told_from_what_is_malformed(server: RunningServer) -> None:
    codes = []
    for content in ([IMAGE], 5):
        body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}]}
        codes.append(server.shared_http.post(CHAT, json=body).json()["error"]["code"])
    assert codes == ["unsupported_parameter", "invalid_value"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 90_000,
        b'{"model": "m", "messages": [], "temperature": NaN}', b'{"model": "m", "top_p": Infinity}',
        b'{"model": "m", "prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    ],
    ids=lambda body: body[:30].decode("latin-1"),
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_body_that_is_no_json_object_is_refused(server: RunningServer, path: str, body: bytes) -> None:
    with server.http() as http:
        response = http.post(path, content=body, headers=JSON)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert_alive(server, http)


def test_an_infinite_number_is_refused_where_it_stands(server: RunningServer) -> None:
    body = f'{{"model": "{MODEL_NAME}", "prompt": "Hi", "temperature": 1e999}}'
    with server.http() as http:
        assert_error(http.post(COMPLETIONS, content=body, headers=JSON), 400, "temperature")


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x", "application/xml", ""])
def test_a_body_must_be_declared_as_json(server: RunningServer, content_type: str) -> None:
    with server.http() as http:
        response = http.post(CHAT, content=b"{}", headers={"content-type": content_type})
        assert_error(response, 415)
        assert_alive(server, http)


def test_too_large_a_body_is_refused_whether_announced_or_not(server: RunningServer) -> None:
    half = b"x" * (MAX_BODY_BYTES // 2 + 1)
    with server.http() as http:
        assert_error(http.post(CHAT, content=half * 2, headers=JSON), 413)
    with server.http() as http:
        assert_error(http.post(CHAT, content=iter([half, half]), headers=JSON), 413)
        assert_alive(server, http)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1", 404), ("POST", "/v1/embeddings", 404), ("GET", CHAT, 405), ("POST", "/health", 405)],
)
def test_unknown_paths_and_methods_get_error_objects(
    server: RunningServer, method: str, path: str, status: int
) -> None:
    with server.http() as http:
        assert_error(http.request(method, path), status)


def test_an_unknown_model_is_not_found(server: RunningServer) -> None:
    with server.http() as http:
        response = http.post(CHAT, json={"model": "gpt-9", "messages": [USER]})
        assert assert_error(response, 404, "model")["code"] == "model_not_found"


@pytest.mark.parametrize(
    "fields", [{"model": "x" * 50_000}, {"stop": {"x" * 50_000: 1}}, {"logit_bias": {"x" * 50_000: 1}}]
)
def test_an_error_quotes_only_the_beginning_of_long_values(server: RunningServer, fields: dict[str, object]) -> None:
    with server.http() as http:
        response = http.post(CHAT, json={"model": MODEL_NAME, "messages": [USER], **fields})
    assert response.status_code in (400, 404)
    assert len(response.content) < 2000


def test_the_name_of_a_field_given_twice_is_shortened_too(server: RunningServer) -> None:
    name = "x" * 50_000
    response = server.shared_http.post(CHAT, content=f'{{"{name}": 1, "{name}": 2}}', headers=JSON)
    assert response.status_code == 400
    assert name.startswith(response.json()["error"]["param"].removesuffix("..."))
    assert len(response.content) < 2000


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt": "x" * 512}, "prompt"), ({"prompt": "x" * 600}, "prompt"), ({"prompt": "x" * 9000}, "prompt")],
)
def test_what_exceeds_the_context_is_refused_before_the_engine_sees_it(
    server: RunningServer, fields: dict[str, object], param: str
) -> None:
    num_requests = len(server.engine.requests)
    with server.http() as http:
        response = http.post(COMPLETIONS, json={"model": MODEL_NAME, "prompt": "Hi, you", **fields})
    assert assert_error(response, 400, param)["code"] == "context_length_exceeded"
    assert len(server.engine.requests) == num_requests


def test_the_default_limit_shrinks_to_what_is_left_of_the_context(server: RunningServer) -> None:
    with server.http() as http:
        response = http.post(COMPLETIONS, json={"model": MODEL_NAME, "prompt": [5] * 510})
    assert response.json()["usage"]["completion_tokens"] == 2


def test_chat_without_a_template_points_to_completions() -> None:
    with running(ScriptedEngine(info=make_info(chat_template=None))) as server, server.http() as http:
        error = assert_error(http.post(CHAT, json={"model": MODEL_NAME, "messages": [USER]}), 400, "messages")
        assert "/v1/completions" in error["message"]


def test_a_template_that_refuses_the_messages_is_the_clients_error() -> None:
    info = make_info(chat_template="{{ raise_exception('roles must alternate') }}")
    with running(ScriptedEngine(info=info)) as server, server.http() as http:
        for path, field, value in ((CHAT, "messages", [USER]), (RESPONSES, "input", "Hi")):
            error = assert_error(http.post(path, json={"model": MODEL_NAME, field: value}), 400, field)
            assert "roles must alternate" in error["message"]
