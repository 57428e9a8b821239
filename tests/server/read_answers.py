"""Reads answers as clients do: whole or from the events of a stream."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@dataclass
class Answer:
    """What a client gets to know.

    Attributes:
        text: None where there is none beside calls.
        calls: names and arguments.
        finish_reason: of the choice; the status of a response.
    """

    text: str | None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    finish_reason: str | None = None


def read_answer(response: httpx.Response, path: str) -> Answer:
    """The first choice of an answer, whose other fields that clients rely on must be there."""
    if "text/event-stream" not in response.headers["content-type"]:
        readers = {CHAT: _read_chat, COMPLETIONS: _read_completion, RESPONSES: _read_response}
        return readers[path](response.json())
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    if path == RESPONSES:
        return _read_response_events([json.loads(line) for line in lines])
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    sent = json.loads(response.request.content)
    if (sent.get("stream_options") or {}).get("include_usage"):
        assert chunks[-1]["choices"] == []
        _check_usage(chunks.pop()["usage"])
    return _read_chat_chunks(chunks) if path == CHAT else _read_completion_chunks(chunks)


def _check_usage(usage: dict[str, int]) -> None:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def _read_chat(body: dict[str, Any]) -> Answer:
    assert body["object"] == "chat.completion"
    _check_usage(body["usage"])
    choice = body["choices"][0]
    message = choice["message"]
    assert message["role"] == "assistant"
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return Answer(message["content"], [_call(call) for call in calls], choice["finish_reason"])


def _call(function: dict[str, str]) -> tuple[str, dict[str, Any]]:
    return function["name"], json.loads(function["arguments"])


def _read_chat_chunks(chunks: list[dict[str, Any]]) -> Answer:
    answer, functions = Answer(None), dict[int, dict[str, str]]()
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        choice = chunk["choices"][0]
        if content := choice["delta"].get("content"):
            answer.text = (answer.text or "") + content
        calls = choice["delta"].get("tool_calls") or ()
        assert len(calls) <= 1, "LlamaIndex and avante.nvim read the first of a chunk only"
        for call in calls:
            function = functions.setdefault(call["index"], {"name": "", "arguments": ""})
            for name, piece in call["function"].items():
                function[name] += piece
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    answer.calls = [_call(function) for function in functions.values()]
    return answer


def _read_completion(body: dict[str, Any]) -> Answer:
    assert body["object"] == "text_completion"
    _check_usage(body["usage"])
    choice = body["choices"][0]
    return Answer(choice["text"], finish_reason=choice["finish_reason"])


def _read_completion_chunks(chunks: list[dict[str, Any]]) -> Answer:
    choices = [chunk["choices"][0] for chunk in chunks]
    return Answer("".join(choice["text"] for choice in choices), finish_reason=choices[-1]["finish_reason"])


def _read_response(body: dict[str, Any]) -> Answer:
    assert body["object"] == "response"
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + body["usage"]["output_tokens"]
    parts = [part for item in body["output"] if item["type"] == "message" for part in item["content"]]
    calls = [_call(item) for item in body["output"] if item["type"] == "function_call"]
    text = "".join(part["text"] for part in parts) if parts else None
    return Answer(text, calls, body["status"])


def _read_response_events(events: list[dict[str, Any]]) -> Answer:
    """What the last event has, which the events before it must have brought."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    answer = _read_response(events[-1]["response"])
    assert events[-1]["type"] == f"response.{answer.finish_reason}"
    pieces = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(pieces) == (answer.text or "")
    return answer
