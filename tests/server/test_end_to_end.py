"""The whole of it: command line, worker process, engine and a tiny random checkpoint."""

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server.harness import wait_until
from tests.server.serve_process import ServeProcess, serving


@pytest.fixture(scope="module")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with serving(tiny_llama, tmp_path_factory.mktemp("serve") / "log") as process:
        yield process


def test_every_block_length_gives_the_text_that_ar_gives(served: ServeProcess) -> None:
    texts = {served.complete(max_tokens=40, ignore_eos=True, block_length=length) for length in (1, 2, 5, 16)}
    assert len(texts) == 1


def test_an_output_matches_its_form_at_every_block_length(served: ServeProcess) -> None:
    form = "[a-f]{3,9}-(the server|the client)[0-9]{1,4};"
    texts = {served.complete(max_tokens=60, guided_regex=form, block_length=length) for length in (1, 5, 16)}
    assert len(texts) == 1
    assert re.fullmatch(form, texts.pop())


def test_clients_that_leave_give_their_blocks_back(served: ServeProcess) -> None:
    body = {"model": "tiny", "prompt": "Once upon", "ignore_eos": True, "max_tokens": 400, "stream": True, "n": 2}
    with served.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: served.metric("cllm_requests_running") == 0)
    served.complete(max_tokens=1)
    assert served.metric("cllm_cache_blocks_used") == 0


def test_a_killed_worker_ends_its_streams_and_is_replaced(served: ServeProcess) -> None:
    body = {"model": "tiny", "prompt": "Once upon", "ignore_eos": True, "max_tokens": 400, "stream": True}
    pid = int(str(served.logged("worker process")[-1]["event"]).split()[2])
    with served.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(pid, signal.SIGKILL)
        *_, last = (line for line in lines if line)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
    served.wait_ready()
    assert served.complete(max_tokens=4)
    assert served.metric("cllm_worker_restarts_total") == 1


def test_a_server_that_leaves_under_load_loses_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    """Behind SIGTERM it says that it is not ready, still answers for a while, and lets what runs finish."""
    body = {"model": "tiny", "prompt": "Once upon", "ignore_eos": True, "max_tokens": 300, "stream": True}
    with serving(tiny_llama, tmp_path / "log", "--shutdown-delay=1.5") as served, ThreadPoolExecutor(6) as pool:
        running = [pool.submit(ends_of_stream, served, body) for _ in range(4)]
        wait_until(lambda: served.metric("cllm_requests_running") == 4)
        os.kill(served.pid or 0, signal.SIGTERM)
        wait_until(lambda: served.http.get("/ready").status_code == 503)
        assert served.http.get("/ready").json()["engine"] == "draining"
        late = pool.submit(ends_of_stream, served, {**body, "max_tokens": 3})
        assert late.result() == ["length", "[DONE]"]
        assert [stream.result() for stream in running] == [["length", "[DONE]"]] * 4


def ends_of_stream(served: ServeProcess, body: dict[str, object]) -> list[str]:
    """The last finish reason of a stream, and its last event."""
    with served.http.stream("POST", "/v1/completions", json=body) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    reasons = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]]
    return [reasons[-1], events[-1]]
