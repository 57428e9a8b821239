"""Completions that repeat their prompt, with log-probabilities as evaluation harnesses read them."""

from itertools import pairwise
from typing import Any

import pytest

from tests.server.fakes import ANSWER, MODEL_NAME
from tests.server.harness import RunningServer

PROMPT = "Say hello to the world:"


def complete(server: RunningServer, **fields: object) -> Any:
    body = {"model": MODEL_NAME, "prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": 200, **fields}
    response = server.shared_http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_there_is_one_entry_for_each_token_that_usage_counts(server: RunningServer) -> None:
    body = complete(server)
    logprobs = body["choices"][0]["logprobs"]
    assert {len(entries) for entries in logprobs.values()} == {body["usage"]["total_tokens"]}
    assert logprobs["tokens"][-1] == "</s>"


def test_the_first_token_follows_nothing_and_the_others_have_their_own(server: RunningServer) -> None:
    body = complete(server)
    num_prompt = body["usage"]["prompt_tokens"]
    logprobs = body["choices"][0]["logprobs"]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["token_logprobs"][1:num_prompt] == [-1 / position for position in range(1, num_prompt)]
    assert logprobs["top_logprobs"][1][logprobs["tokens"][1]] == -1.0
    assert set(logprobs["token_logprobs"][num_prompt:]) == {-0.5}


@pytest.mark.parametrize("answer_tokens", [0, 3])
def test_tokens_stand_where_their_offsets_say(server: RunningServer, answer_tokens: int) -> None:
    choice = complete(server, max_tokens=answer_tokens)["choices"][0]
    offsets = [*choice["logprobs"]["text_offset"], len(choice["text"])]
    texts = [choice["text"][start:end] for start, end in pairwise(offsets)]
    assert texts == choice["logprobs"]["tokens"]
    assert choice["text"].startswith(PROMPT)


def test_a_prompt_of_token_ids_reads_the_same(server: RunningServer) -> None:
    ids = server.engine.requests[-1].prompt_ids
    [by_text, by_ids] = [complete(server, prompt=prompt)["choices"][0] for prompt in (PROMPT, ids)]
    assert by_ids == by_text


def test_the_chunks_of_a_stream_add_up_to_the_whole(server: RunningServer) -> None:
    whole = complete(server)["choices"][0]
    stream = server.openai().completions.create(
        model=MODEL_NAME, prompt=PROMPT, echo=True, logprobs=2, max_tokens=200, stream=True
    )
    parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.text for part in parts) == whole["text"] == PROMPT + ANSWER
    found = [part.logprobs for part in parts if part.logprobs is not None]
    assert [token for entries in found for token in entries.tokens or ()] == whole["logprobs"]["tokens"]
    assert [offset for entries in found for offset in entries.text_offset or ()] == whole["logprobs"]["text_offset"]


def test_a_stop_string_leaves_no_entry_for_what_came_behind_it(server: RunningServer) -> None:
    """The engine's last step brings the end token with the text that stops."""
    last_word = ANSWER.split()[-1]
    body = complete(server, stop=last_word)
    logprobs = body["choices"][0]["logprobs"]
    assert body["choices"][0]["text"] == PROMPT + ANSWER.removesuffix(last_word)
    assert "</s>" not in logprobs["tokens"]


def test_a_prompt_can_be_scored_without_any_answer(server: RunningServer) -> None:
    body = complete(server, max_tokens=0)
    assert body["choices"][0]["text"] == PROMPT
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    assert len(body["choices"][0]["logprobs"]["tokens"]) == body["usage"]["prompt_tokens"]


def test_every_choice_of_every_prompt_is_scored(server: RunningServer) -> None:
    choices = complete(server, prompt=["one two", "three"], n=2, max_tokens=1)["choices"]
    assert [choice["logprobs"]["token_logprobs"][0] for choice in choices] == [None] * 4
    assert choices[0]["logprobs"]["tokens"][:-1] == choices[1]["logprobs"]["tokens"][:-1]


def test_an_echo_without_logprobs_asks_the_engine_for_none(server: RunningServer) -> None:
    assert complete(server, logprobs=None, max_tokens=0)["choices"][0]["logprobs"] is None
    assert server.engine.requests[-1].params.prompt_logprobs is None
