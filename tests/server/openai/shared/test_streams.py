"""Server-sent events as they come over the wire, and what answers hold: stop strings, log-probabilities, fields."""

import json
from typing import Any

import pytest

from tests.server.fakes import ANSWER, DRAFT, MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat_body(**fields: object) -> dict[str, object]:
    return {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}], **fields}


def completion_body(**fields: object) -> dict[str, object]:
    return {"model": MODEL_NAME, "prompt": "Say:", "max_tokens": 100, **fields}


def events_of(server: RunningServer, path: str, body: dict[str, object]) -> list[str]:
    """The data of each event."""
    with server.http() as http:
        response = http.post(path, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def post(server: RunningServer, path: str, body: dict[str, object]) -> Any:
    with server.http() as http:
        response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body()), (COMPLETIONS, completion_body())])
def test_a_stream_is_json_events_of_one_id_and_then_done(
    server: RunningServer, path: str, body: dict[str, object]
) -> None:
    *events, last = events_of(server, path, body)
    chunks = [json.loads(event) for event in events]
    assert last == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_usage_is_null_until_the_chunk_that_carries_it(server: RunningServer) -> None:
    *events, _ = events_of(server, CHAT, chat_body(stream_options={"include_usage": True}))
    usages = [json.loads(event)["usage"] for event in events]
    assert usages[:-1] == [None] * (len(events) - 1)
    assert usages[-1]["prompt_tokens_details"] == {"cached_tokens": 1, "audio_tokens": 0}


def test_choices_of_a_stream_are_told_apart_by_their_index(server: RunningServer) -> None:
    *events, _ = events_of(server, COMPLETIONS, completion_body(n=3))
    texts = {0: "", 1: "", 2: ""}
    for event in events:
        choice = json.loads(event)["choices"][0]
        texts[choice["index"]] += choice["text"]
    assert texts == dict.fromkeys(range(3), ANSWER)


@pytest.mark.parametrize("chunk_sizes", [(1,), (2, 3), (16,)])
@pytest.mark.parametrize("stop", ["blue, tr", ["is blue", "sky"], "très", "\N{BUTTERFLY}", "never said"])
def test_stop_strings_never_reach_the_client(chunk_sizes: tuple[int, ...], stop: str | list[str]) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    expected = ANSWER[: min((ANSWER.index(text) for text in stops if text in ANSWER), default=len(ANSWER))]
    with running(ScriptedEngine(chunk_sizes=chunk_sizes)) as server:
        *events, _ = events_of(server, CHAT, chat_body(stop=stop))
        whole = post(server, CHAT, chat_body(stop=stop))
        streamed = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)
        assert streamed == whole["choices"][0]["message"]["content"] == expected
        assert json.loads(events[-1])["choices"][0]["finish_reason"] == "stop"
        assert server.in_loop(lambda: server.engine.num_open) == 0


def test_a_stop_string_ends_the_request_in_the_engine() -> None:
    with running(ScriptedEngine(endless=True, step_seconds=0.001)) as server:
        usage = post(server, COMPLETIONS, completion_body(stop="blue", max_tokens=400))["usage"]
        assert server.engine.aborted == [server.engine.requests[0].request_id]
        assert usage["completion_tokens"] < 20


def test_chat_logprobs_spell_the_answer_in_bytes(server: RunningServer) -> None:
    choice = post(server, CHAT, chat_body(logprobs=True, top_logprobs=2))["choices"][0]
    entries = choice["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == ANSWER
    assert {entry["logprob"] for entry in entries} == {-0.5}
    assert {len(entry["top_logprobs"]) for entry in entries} == {2}


def test_completion_logprobs_line_up_with_the_text(server: RunningServer) -> None:
    choice = post(server, COMPLETIONS, completion_body(logprobs=1))["choices"][0]
    logprobs = choice["logprobs"]
    starts = [choice["text"][offset:].startswith(token) for token, offset in zip(*_ascii_tokens(logprobs), strict=True)]
    assert all(starts)
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])


@pytest.mark.parametrize("num_tops", [0, 2])
def test_completion_logprobs_hold_the_token_itself_beside_the_likeliest(server: RunningServer, num_tops: int) -> None:
    logprobs = post(server, COMPLETIONS, completion_body(logprobs=num_tops))["choices"][0]["logprobs"]
    entries = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
    assert all(tops[token] == logprob for token, logprob, tops in entries)
    assert {len(tops) for _, _, tops in entries} == {num_tops + 1}


def _ascii_tokens(logprobs: dict[str, list[Any]]) -> tuple[list[str], list[int]]:
    pairs = zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
    kept = [(token, offset) for token, offset in pairs if token.isascii() and "\\x" not in token]
    return [token for token, _ in kept], [offset for _, offset in kept]


def test_streamed_logprobs_are_those_of_the_whole_answer(server: RunningServer) -> None:
    whole = post(server, CHAT, chat_body(logprobs=True))["choices"][0]["logprobs"]["content"]
    *events, _ = events_of(server, CHAT, chat_body(logprobs=True))
    parts = [json.loads(event)["choices"][0]["logprobs"] for event in events]
    assert [entry for part in parts if part for entry in part["content"]] == whole


def test_every_sampling_field_reaches_the_engine(server: RunningServer) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "presence_penalty": 0.2,
        "frequency_penalty": -0.3, "repetition_penalty": 1.1, "seed": 11, "min_tokens": 1, "ignore_eos": True,
        "block_length": 4, "max_completion_tokens": 9,
    }  # fmt: skip
    body = chat_body(**fields, logit_bias={"5": -100}, stop_token_ids=[3], cache_salt="mine", stop=["x"])
    post(server, CHAT, body)
    request = server.engine.requests[-1]
    fields["max_tokens"] = fields.pop("max_completion_tokens")
    assert {name: getattr(request.params, name) for name in fields} == fields
    assert (request.params.logit_bias, request.params.stop_token_ids) == ({5: -100.0}, (3,))
    assert (request.params.stop, request.cache_salt) == (("x",), "mine")


def test_fields_left_out_take_openais_defaults(server: RunningServer) -> None:
    post(server, CHAT, chat_body())
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_p, params.max_tokens, params.logprobs) == (1.0, 1.0, None, None)


def test_messages_are_rendered_by_the_models_template(server: RunningServer) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    post(server, CHAT, chat_body(messages=messages))
    text = server.engine.decode(server.engine.requests[-1].prompt_ids)
    assert text == "<system>Be brief.\n<user>hi\nthere\n<assistant>Yes?\n<assistant>"


def test_a_prediction_seeds_the_draft(server: RunningServer) -> None:
    post(server, CHAT, chat_body(prediction={"type": "content", "content": "The sky"}))
    assert server.engine.decode(server.engine.requests[-1].prediction_ids) == "The sky"


def test_values_that_ask_for_nothing_are_welcome(server: RunningServer) -> None:
    neutral = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "user": "me",
        "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logit_bias": None, "stop": None, "audio": None,
    }  # fmt: skip
    assert post(server, CHAT, chat_body(**neutral))["object"] == "chat.completion"


def test_echo_puts_the_prompt_before_the_answer_once(server: RunningServer) -> None:
    *events, _ = events_of(server, COMPLETIONS, completion_body(echo=True))
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == "Say:" + ANSWER
    assert post(server, COMPLETIONS, completion_body(echo=True, best_of=1))["choices"][0]["text"] == "Say:" + ANSWER


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body()), (COMPLETIONS, completion_body())])
def test_a_stream_shows_the_draft_beside_the_text_on_request(
    server: RunningServer, path: str, body: dict[str, object]
) -> None:
    *events, _ = events_of(server, path, {**body, "stream_options": {"include_draft": True}})
    choices = [json.loads(event)["choices"][0] for event in events]
    texts = [choice["text"] if path == COMPLETIONS else choice["delta"].get("content", "") for choice in choices]
    assert "".join(texts) == ANSWER
    assert [choice["draft"] for choice in choices] == [DRAFT] * (len(choices) - 1) + [""]


def test_a_stream_that_did_not_ask_has_no_draft(server: RunningServer) -> None:
    *events, _ = events_of(server, CHAT, chat_body())
    assert not any("draft" in json.loads(event)["choices"][0] for event in events)
    assert not server.engine.requests[-1].wants_draft
