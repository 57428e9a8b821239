"""One request cannot ask for more log-probabilities than the server allows, and many of them do not hold up others."""

import asyncio
import time

import pytest

from cllm_core.errors import InvalidRequest
from cllm_core.request import NewRequest, SamplingParams
from server.openai.shared.logprobs import within_budget
from tests.server.fakes import MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}], "logprobs": True}


def make_request(*, prompt: int = 10, **params: int | None) -> NewRequest:
    return NewRequest(request_id="a", prompt_ids=(1,) * prompt, params=SamplingParams(**params))  # type: ignore[arg-type]


def limits(requests: list[NewRequest], budget: int, *, limit_is_given: bool) -> list[int | None]:
    return [r.params.max_tokens for r in within_budget(requests, budget, limit_is_given=limit_is_given)]


def test_outputs_without_a_limit_are_cut_to_the_budget() -> None:
    requests = [make_request(logprobs=4), make_request(logprobs=4)]
    assert limits(requests, 1000, limit_is_given=False) == [100, 100]
    assert limits([make_request(logprobs=4, prompt_logprobs=9)], 1000, limit_is_given=False) == [180]


def test_outputs_that_fit_and_those_without_log_probabilities_stay_as_they_are() -> None:
    assert limits([make_request(logprobs=0, max_tokens=1000)], 1000, limit_is_given=True) == [1000]
    assert limits([make_request(max_tokens=10**6), make_request()], 1000, limit_is_given=True) == [10**6, None]


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (make_request(logprobs=9, max_tokens=101), "logprobs"),
        (make_request(prompt=101, prompt_logprobs=9, max_tokens=1), "prompt_logprobs"),
        (make_request(prompt=99, prompt_logprobs=9, logprobs=20, max_tokens=1), "logprobs"),
    ],
)
def test_more_than_the_budget_is_refused_with_the_setting_to_raise(request_: NewRequest, param: str) -> None:
    with pytest.raises(InvalidRequest, match=r"allows 1000 a request \(--max-logprob-entries\)") as refused:
        within_budget([request_], 1000, limit_is_given=True)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, MESSAGES | {"top_logprobs": 20, "max_tokens": 400, "n": 2}),
        (COMPLETIONS, {"model": MODEL_NAME, "prompt": "Hi", "logprobs": 20, "max_tokens": 400, "n": 2}),
        ("/v1/responses", {"model": MODEL_NAME, "input": "Hi", "top_logprobs": 20, "max_output_tokens": 400}),
    ],
)
def test_every_endpoint_keeps_to_the_budget(path: str, body: dict[str, object]) -> None:
    if path == "/v1/responses":
        body = body | {"include": ["message.output_text.logprobs"]}
    with running(ScriptedEngine(), max_logprob_entries=1024) as server:
        answer = server.shared_http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")


def longest_stall(server: RunningServer, path: str, body: dict[str, object]) -> float:
    """Longest time in seconds that the server's event loop stood still while it answered."""
    gaps: list[float] = []

    async def watch() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - before)

    watcher = server.in_loop(lambda: asyncio.ensure_future(watch()))
    answer = server.shared_http.post(path, json=body, timeout=60)
    server.in_loop(watcher.cancel)
    assert answer.status_code == 200
    return max(gaps)


@pytest.mark.parametrize("stream", [False, True])
def test_as_many_as_are_allowed_do_not_hold_up_the_loop(stream: bool) -> None:
    """They once took 141 microseconds a token on the loop: seconds for one long answer."""
    engine = ScriptedEngine(endless=True, chunk_sizes=(16,), info=make_info(max_model_len=4000))
    with running(engine) as server:
        body = MESSAGES | {"top_logprobs": 20, "max_tokens": 750, "stream": stream}
        assert longest_stall(server, CHAT, body) < 0.25
