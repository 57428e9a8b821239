"""Fields of /v1/completions that change what is decoded: best_of and suffix."""

from typing import Any

import pytest

from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running

FIM = [
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
]


def complete(server: RunningServer, **fields: object) -> Any:
    body = {"model": MODEL_NAME, "prompt": "Say:", "max_tokens": 100, **fields}
    response = server.shared_http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_best_of_returns_the_likeliest_choices_best_first(server: RunningServer) -> None:
    choices = complete(server, prompt=["one", "two"], n=2, best_of=4, logprobs=0, echo=False)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    # The scripted engine gives every token of choice i the log-probability -1 / (2 + i).
    assert [set(choice["logprobs"]["token_logprobs"]) for choice in choices] == [{-1 / 5}, {-1 / 4}] * 2


def test_usage_counts_the_candidates_that_were_not_returned(server: RunningServer) -> None:
    completion = complete(server, best_of=3)
    assert len(completion["choices"]) == 1
    assert completion["choices"][0]["logprobs"] is None
    assert completion["usage"]["completion_tokens"] == 3 * (len(server.engine.answer_ids) + 1)


def test_best_of_equal_to_n_needs_no_logprobs_and_streams(server: RunningServer) -> None:
    complete(server, n=2, best_of=2)
    assert server.engine.requests[-1].params.logprobs is None
    body = {"model": MODEL_NAME, "prompt": "Say:", "n": 2, "best_of": 2, "stream": True}
    assert server.shared_http.post("/v1/completions", json=body).status_code == 200


def test_best_of_goes_with_echo(server: RunningServer) -> None:
    assert complete(server, best_of=2, echo=True)["choices"][0]["text"] == "Say:" + ANSWER


@pytest.mark.parametrize("markers", FIM, ids=str)
def test_a_suffix_makes_a_fill_in_the_middle_prompt(markers: tuple[str, str, str]) -> None:
    with running(ScriptedEngine(info=make_info(more_tokens=markers))) as server:
        complete(server, prompt=["a", "b"], suffix="z")
        spelled = [[server.engine.token_text(i) for i in request.prompt_ids] for request in server.engine.requests]
    before_prefix, before_suffix, before_middle = markers
    assert spelled == [[before_prefix, start, before_suffix, "z", before_middle] for start in "ab"]


def test_an_empty_suffix_asks_for_nothing(server: RunningServer) -> None:
    complete(server, suffix="")
    assert server.engine.decode(server.engine.requests[-1].prompt_ids) == "Say:"
