"""`cllm serve` as a user starts it: a process of its own with its worker, on a free port of the loopback interface."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.server.harness import wait_until

LOAD_SECONDS = 120.0  # torch is slow to import on a busy machine

FROM_SOURCES = (sys.executable, "-c", "from server.cli import main; main()")
OPTIONS = [
    "--served-model-name=tiny", "--device=cpu", "--dtype=float32", "--num-threads=1", "--num-cache-blocks=64",
    "--port=0", "--log-format=json",
]  # fmt: skip


class ServeProcess:
    """A running `cllm serve` and its log."""

    def __init__(self, log: Path, pid: int | None = None) -> None:
        self._log = log
        self.pid = pid
        wait_until(lambda: bool(self.logged("listening")), seconds=LOAD_SECONDS)
        self.url = str(self.logged("listening")[-1]["address"])
        self.http = httpx.Client(base_url=self.url, timeout=60, verify=False)

    def logged(self, event: str) -> list[dict[str, object]]:
        """Log lines whose event starts like this."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if str(line["event"]).startswith(event)]

    def wait_ready(self) -> None:
        """Wait until requests are taken."""
        wait_until(lambda: self.http.get("/ready").status_code == 200, seconds=LOAD_SECONDS)

    def metric(self, name: str) -> float:
        """Value of a metric."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return next(sample.value for family in families for sample in family.samples if sample.name == name)

    def complete(self, **fields: object) -> str:
        """Greedy continuation of a prompt."""
        body = {"model": "tiny", "prompt": "Once upon", "temperature": 0, **fields}
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])


@contextmanager
def serving(
    checkpoint: Path | str,
    log: Path,
    *options: str,
    program: Sequence[str] = FROM_SOURCES,
    environment: Mapping[str, str] | None = None,
) -> Iterator[ServeProcess]:
    """Serve a checkpoint as `tiny` for the time of the block, once it is ready; `environment` is added to ours."""
    command = [*program, "serve", str(checkpoint), *OPTIONS, *options]
    around = {**os.environ, **(environment or {})}
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr, env=around) as process:
        try:
            served = ServeProcess(log, process.pid)
            with served.http:
                served.wait_ready()
                yield served
        finally:
            process.terminate()
            process.wait(timeout=60)
