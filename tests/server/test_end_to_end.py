"""`cllm serve` as a user starts it: command line, worker process, engine and a tiny random checkpoint."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.harness import wait_until

LOAD_SECONDS = 120.0  # torch is slow to import on a busy machine

OPTIONS = [
    "--served-model-name=tiny", "--device=cpu", "--dtype=float32", "--num-threads=1", "--num-cache-blocks=64",
    "--port=0", "--log-format=json",
]  # fmt: skip


class ServeProcess:
    """A running `cllm serve` and its log."""

    def __init__(self, log: Path) -> None:
        self._log = log
        wait_until(lambda: bool(self.logged("listening")), seconds=LOAD_SECONDS)
        self.http = httpx.Client(base_url=str(self.logged("listening")[-1]["address"]), timeout=60, verify=False)

    def logged(self, event: str) -> list[dict[str, object]]:
        """Log lines whose event starts like this."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if str(line["event"]).startswith(event)]

    def wait_ready(self) -> None:
        wait_until(lambda: self.http.get("/ready").status_code == 200, seconds=LOAD_SECONDS)

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return next(sample.value for family in families for sample in family.samples if sample.name == name)

    def complete(self, **fields: object) -> str:
        body = {"model": "tiny", "prompt": "Once upon", "temperature": 0, **fields}
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])


@pytest.fixture(scope="module")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", str(tiny_llama), *OPTIONS]
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            served = ServeProcess(log)
            with served.http:
                served.wait_ready()
                yield served
        finally:
            process.terminate()
            process.wait(timeout=60)


def test_every_block_length_gives_the_text_that_ar_gives(served: ServeProcess) -> None:
    texts = {served.complete(max_tokens=40, ignore_eos=True, block_length=length) for length in (1, 2, 5, 16)}
    assert len(texts) == 1


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
