"""How the server ends: on a signal without losing a request, and by itself where the engine has failed for good."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running, wait_until

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}]}

SERVE = """
import sys
import server.cli.serve as command
from cllm_core.worker.client import supervised_worker
from server.settings import ServerSettings

engine = ("--engine", "tests.worker.fake_engine:build_missing_model")
command.make_engine = lambda settings: supervised_worker(settings.to_engine_config(), worker_arguments=engine)
command.serve(ServerSettings(port=0, log_format="json", stay_up=len(sys.argv) > 1))
"""


class Load:
    """Clients behind a load balancer: they send one request after the other while /ready is 200."""

    def __init__(self, server: RunningServer, num_clients: int) -> None:
        self.statuses: Counter[int | str] = Counter()
        self._server = server
        self._threads = [threading.Thread(target=self._run, args=(bool(i % 2),)) for i in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(timeout=30)

    def _run(self, stream: bool) -> None:
        with self._server.http() as http:
            while http.get("/ready").status_code == 200:
                # A load balancer looks now and then: it may send for a while after /ready has changed.
                for _ in range(3):
                    self.statuses[self._ask(http, stream)] += 1

    def _ask(self, http: httpx.Client, stream: bool) -> int | str:
        try:
            response = http.post(CHAT, json={**BODY, "stream": stream})
        except httpx.HTTPError as error:
            return type(error).__name__
        is_whole = response.text.rstrip().endswith("[DONE]") if stream else ANSWER in response.text
        return response.status_code if is_whole else "not whole"


def test_a_server_that_leaves_under_load_loses_no_request() -> None:
    with running(ScriptedEngine(step_seconds=0.01), shutdown_delay=2.0) as server:
        load = Load(server, 6)
        wait_until(lambda: load.statuses[200] > 20)
        server.terminate()
        load.join()
    assert load.statuses.keys() == {200}


def test_the_listener_answers_while_ready_is_503() -> None:
    with running(ScriptedEngine(), shutdown_delay=2.0) as server, server.http() as http:
        server.terminate()
        wait_until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/ready").json()["engine"] == "draining"
        assert http.get("/health").status_code == 200
        response = http.post(CHAT, json=BODY)
        assert (response.status_code, response.headers["connection"]) == (200, "close")


def test_without_a_delay_the_server_leaves_at_once() -> None:
    with running(ScriptedEngine()) as server:
        server.terminate()
        started = time.monotonic()
    assert time.monotonic() - started < 2


def _serve_a_missing_model(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_server_whose_model_cannot_be_loaded_exits_and_says_so_once() -> None:
    """It used to answer 503 for ever and to log the reason four times."""
    with _serve_a_missing_model() as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert log.count("does not exist: check the name") == 1


def test_a_server_told_to_stay_up_answers_after_a_failed_load() -> None:
    with _serve_a_missing_model("stay") as process:
        assert process.stderr is not None
        lines = (json.loads(line) for line in process.stderr if line.startswith("{"))
        url = next(str(line["address"]) for line in lines if line["event"] == "listening")
        wait_until(lambda: httpx.get(f"{url}/health").json()["engine"] == "failed", seconds=60)
        assert process.poll() is None
        process.terminate()
        process.communicate(timeout=60)


def test_an_engine_that_fails_for_good_ends_the_server() -> None:
    with running(ScriptedEngine()) as server:
        server.in_loop(server.engine.give_up)
        wait_until(lambda: not _answers(server.url))


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code > 0
    except httpx.ConnectError:
        return False
