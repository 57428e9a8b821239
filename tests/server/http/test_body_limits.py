"""Hostile bodies are refused within a second, whatever they hold, and the server goes on."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cllm_core.request import BOUNDS
from server.http.body_limits import MAX_CONTAINERS
from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "Hi"}
MAX_SECONDS = 1.0  # of the processor, server and client together: a busy machine is no fault


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(ScriptedEngine(), max_depth=10) as running_server:
        yield running_server


def nested(depth: int) -> object:
    value: object = "x"
    for _ in range(depth):
        value = [value]
    return value


def tool(**changes: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f", **changes}}


def called(arguments: str) -> dict[str, object]:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


HOSTILE: dict[str, tuple[str, dict[str, object], str | None]] = {
    "messages": (CHAT, {"messages": [USER] * 60_000}, "messages"),
    "more messages": (CHAT, {"messages": [USER] * 200_000}, None),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 60_000}]}, "messages"),
    "parts of parts": (CHAT, {"messages": [{"role": "user", "content": [[]] * 4000}] * 400}, None),
    "no messages": (CHAT, {"messages": [1] * 1_000_000}, "messages"),
    "fields": (CHAT, {"messages": [USER], **{f"f{i}": 1 for i in range(200_000)}}, None),
    "logit_bias": (CHAT, {"messages": [USER], "logit_bias": {str(i): 1 for i in range(200_000)}}, "logit_bias"),
    "stop ids": (CHAT, {"messages": [USER], "stop_token_ids": ["x"] * 1_000_000}, "stop_token_ids"),
    "stop strings": (CHAT, {"messages": [USER], "stop": ["x"] * 1_000_000}, "stop"),
    "long stop string": (CHAT, {"messages": [USER], "stop": "x" * 4_000_000}, "stop"),
    "long stop strings": (CHAT, {"messages": [USER], "stop": ["x", "y" * 1025]}, "stop"),
    "tools": (CHAT, {"messages": [USER], "tools": [tool()] * 4000}, "tools"),
    "long tools": (CHAT, {"messages": [USER], "tools": [tool(description="x" * 4_000_000)]}, "tools"),
    "same tools": (CHAT, {"messages": [USER], "tools": [tool()] * 128}, "tools"),
    "many results": (
        CHAT,
        {"messages": [{"role": "tool", "content": "", "tool_call_id": "x"}] * 4000},
        "messages",
    ),
    "calls nested in text": (
        CHAT,
        {"messages": [called("[" * 4_000_000)]},
        "messages",
    ),
    "deep": (CHAT, {"messages": [USER], "metadata": nested(10)}, "metadata"),
    "prompts": (COMPLETIONS, {"prompt": ["x"] * 1_000_000}, "prompt"),
    "prompts of ids": (COMPLETIONS, {"prompt": [[1]] * 500_000}, None),
    "prompts of one id": (COMPLETIONS, {"prompt": [[1]] * 5000}, "prompt"),
    "ids": (COMPLETIONS, {"prompt": [1] * 2_000_000}, "prompt"),
    "ids and one that is none": (COMPLETIONS, {"prompt": [*[1] * 2_000_000, "x"]}, "prompt"),
    "long prompt": (COMPLETIONS, {"prompt": "x " * 100_000}, "prompt"),
    "very long prompt": (COMPLETIONS, {"prompt": "x " * 3_500_000}, "prompt"),
    "very long prompts": (COMPLETIONS, {"prompt": ["x " * 25_000] * 100}, "prompt"),
    "very long suffix": (COMPLETIONS, {"prompt": "x", "suffix": "x " * 3_500_000}, "prompt"),
    "very long message": (CHAT, {"messages": [{"role": "user", "content": "x " * 3_500_000}]}, "messages"),
    "very long input": (RESPONSES, {"input": "x " * 3_500_000}, "input"),
    "very long prediction": (
        CHAT,
        {"messages": [USER], "prediction": {"type": "content", "content": "x " * 3_500_000}},
        "prediction",
    ),
    "low max_tokens": (CHAT, {"messages": [USER], "max_tokens": -(10**18)}, "max_tokens"),
    "low max_output_tokens": (RESPONSES, {"input": "x", "max_output_tokens": -(10**18)}, "max_output_tokens"),
    "huge top_logprobs": (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 10**18}, "top_logprobs"),
    "huge numbers": (CHAT, {"messages": [USER], "seed": 10**4000}, "seed"),
    "huge block_length": (CHAT, {"messages": [USER], "block_length": 10**18}, "block_length"),
    "huge min_tokens": (CHAT, {"messages": [USER], "min_tokens": 10**18}, "min_tokens"),
    "metadata": (CHAT, {"messages": [USER], "metadata": {str(i): "x" for i in range(5000)}}, "metadata"),
    "template kwargs": (
        CHAT,
        {"messages": [USER], "chat_template_kwargs": {"x": "y" * 20_000}},
        "chat_template_kwargs",
    ),
    "huge n": (COMPLETIONS, {"prompt": "x", "n": 10**18}, "n"),
    "huge best_of": (COMPLETIONS, {"prompt": "x", "best_of": 10**18}, "best_of"),
    "huge logprobs": (COMPLETIONS, {"prompt": "x", "logprobs": 10**18}, "logprobs"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused_at_once(server: RunningServer, name: str) -> None:
    path, fields, param = HOSTILE[name]
    body = json.dumps({"model": MODEL_NAME, **fields}).encode()
    start = time.process_time()
    response = server.shared_http.post(path, content=body, headers=JSON)
    seconds = time.process_time() - start
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert len(response.content) < 2000
    assert seconds < MAX_SECONDS
    assert answer_of(server, {"messages": [USER]}) == ANSWER


def answer_of(server: RunningServer, fields: dict[str, object]) -> Any:
    response = server.shared_http.post(CHAT, json={"model": MODEL_NAME, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_what_is_within_the_limits_is_served(server: RunningServer) -> None:
    fields: dict[str, object] = {
        "messages": [USER] * 10,
        "stop": ["x" * 1024],
        "logit_bias": {str(token_id): 0 for token_id in range(200)},
    }
    assert answer_of(server, fields) == ANSWER


def test_a_text_that_does_not_end_is_looked_at_once(server: RunningServer) -> None:
    """Each of its escaped quotes might begin a text that does not end either."""
    body = b"[" * (MAX_CONTAINERS + 1) + b'"' + b'\\"' * 2_000_000
    start = time.process_time()
    response = server.shared_http.post(COMPLETIONS, content=body, headers=JSON)
    assert time.process_time() - start < MAX_SECONDS
    assert response.status_code == 400


def test_brackets_in_texts_open_nothing(server: RunningServer) -> None:
    """Program text is full of them, escaped quotes included."""
    text = '[{"\\' * (MAX_CONTAINERS // 2 + 1)
    response = server.shared_http.post(COMPLETIONS, json={"model": MODEL_NAME, "prompt": text})
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_limits_are_settings() -> None:
    with running(ScriptedEngine(), max_items=64, max_stop_chars=3) as server:
        for fields in ({"messages": [USER] * 65}, {"messages": [USER], "stop": "long"}):
            response = server.shared_http.post(CHAT, json={"model": MODEL_NAME, **fields})
            assert response.status_code == 400
        assert answer_of(server, {"messages": [USER], "stop": "zzz"}) == ANSWER


@pytest.mark.parametrize("num_chars", [512, 600, 100_000])
@pytest.mark.parametrize(
    ("path", "field", "wrap"),
    [
        (CHAT, "messages", lambda text: [{"role": "user", "content": text}]),
        (COMPLETIONS, "prompt", lambda text: text),
        (COMPLETIONS, "prompt", lambda text: ["Hi", text]),
        (RESPONSES, "input", lambda text: text),
    ],
)
def test_a_prompt_beyond_the_context_is_named_as_such_on_every_endpoint(
    server: RunningServer, path: str, field: str, wrap: Callable[[str], object], num_chars: int
) -> None:
    body = {"model": MODEL_NAME, field: wrap("x" * num_chars), "stream": num_chars == 600}
    response = server.shared_http.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == field


@pytest.mark.parametrize(
    "fields",
    [{"stop": []}, {"stop_token_ids": []}, {"logit_bias": {}}, {"tools": []}, {"metadata": {}}, {"stop": None}],
    ids=str,
)
def test_empty_lists_that_ask_for_nothing_are_served(server: RunningServer, fields: dict[str, object]) -> None:
    assert answer_of(server, {"messages": [USER], **fields}) == ANSWER


LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
HUGE = 10**4300 - 1  # as long as the parser takes
NUMBERS: list[tuple[str, dict[str, object]]] = [
    *((CHAT, {"messages": [USER], name: HUGE}) for name in sorted(BOUNDS.keys() - {"logprobs", "prompt_logprobs"})),
    (CHAT, {"messages": [USER], "n": HUGE}),
    (CHAT, {"messages": [USER], "max_completion_tokens": HUGE}),
    (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": HUGE}),
    (CHAT, {"messages": [USER], "logit_bias": {"5": HUGE}}),
    (CHAT, {"messages": [USER], "logit_bias": {str(HUGE): 1}}),
    (CHAT, {"messages": [USER], "logit_bias": {"1" * 5000: 1}}),
    (CHAT, {"messages": [USER], "stop_token_ids": [HUGE]}),
    (COMPLETIONS, {"prompt": "x", "logprobs": HUGE}),
    (COMPLETIONS, {"prompt": "x", "best_of": HUGE}),
    (COMPLETIONS, {"prompt": ["x"] * 10, "best_of": HUGE}),
    (COMPLETIONS, {"prompt": ["x"] * 10, "n": HUGE}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": HUGE}),
    (COMPLETIONS, {"prompt": [HUGE]}),
    (RESPONSES, {"input": "x", "max_output_tokens": HUGE}),
    ("/detokenize", {"tokens": [HUGE]}),
]


@pytest.mark.parametrize(("path", "fields"), NUMBERS, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("sign", ["", "-"])
def test_a_number_of_thousands_of_digits_is_out_of_range(
    server: RunningServer, path: str, fields: dict[str, object], sign: str
) -> None:
    """Python refuses to convert such integers to floats, with an error of its own."""
    body = json.dumps({"model": MODEL_NAME, **fields}).replace(str(HUGE), sign + str(HUGE))
    response = server.shared_http.post(path, content=body, headers=JSON)
    is_limit = not sign and not fields.keys().isdisjoint(LIMITS)  # cut to the room there is
    assert response.status_code == (200 if is_limit else 400), response.text
    assert len(response.content) < 2000
