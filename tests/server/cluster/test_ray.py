"""`cllm deploy` on a cluster of this machine: two replicas on its processors."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.harness import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
pytest.importorskip("ray", reason="needs Ray: make test-ray")

START_SECONDS = 300.0
OPTIONS = [
    "--served-model-name=tiny", "--device=cpu", "--dtype=float32", "--num-threads=1", "--num-cache-blocks=512",
    "--drain-seconds=60", "--log-format=json",
]  # fmt: skip


class Cluster:
    """An application on a cluster of its own."""

    def __init__(self, app_name: str, port: int) -> None:
        self._app_name = app_name
        self.port = port
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    def chat(self, *contents: str, max_tokens: int = 12) -> httpx.Response:
        """The greedy answer to a conversation of these messages, users' and assistant's in turn."""
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
        body = {"messages": messages, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
        return self.http.post("/v1/chat/completions", json=body)

    def stream(self, prompt: str, max_tokens: int) -> tuple[str, str]:
        """Text of a streamed completion, and how it ended: a finish reason or the code of an error."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        text, end = "", ""
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    assert not end
                    end = event["error"]["code"]
                    continue
                (choice,) = event["choices"]
                text += choice["text"]
                if choice["finish_reason"]:
                    assert not end
                    end = choice["finish_reason"]
        return text, end

    def series(self, name: str) -> dict[str, float]:
        """A metric by replica, summed over other labels."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name:
                    found[sample.labels["replica"]] = found.get(sample.labels["replica"], 0.0) + sample.value
        return found

    def replicas(self) -> list[psutil.Process]:
        """Processes of the replicas."""
        name = f"ray::ServeReplica:{self._app_name}:replica"
        return [process for process in psutil.process_iter() if _title(process).startswith(name)]

    def wait_for_replicas(self, count: int, *, seconds: float = START_SECONDS) -> None:
        """Wait until that many answer."""
        wait_until(lambda: self._num_answering() == count, seconds=seconds)

    def _num_answering(self) -> int:
        try:
            return len(self.series("cllm_ready"))
        except httpx.HTTPError:
            return 0
        except ValueError:  # an error body in place of metrics, while a replica is lost
            return 0


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(checkpoint: Path, app_name: str, port: int, options: Sequence[str]) -> list[str]:
    program = [sys.executable, "-c", "from cllm_server.cli import main; main()", "deploy", str(checkpoint)]
    return [*program, f"--app-name={app_name}", f"--port={port}", *OPTIONS, *options]


@contextmanager
def deployed(checkpoint: Path, log: Path, *options: str) -> Iterator[Cluster]:
    """A cluster with the application for the time of the block."""
    app_name, port = f"test{os.getpid()}x{free_port()}", free_port()
    with (
        log.open("wb") as output,
        subprocess.Popen(command(checkpoint, app_name, port, options), stdout=output, stderr=output) as process,
    ):
        try:
            wait_until(
                lambda: "serving on the cluster" in log.read_text() or process.poll() is not None, seconds=START_SECONDS
            )
            assert process.poll() is None, log.read_text()[-4000:]
            cluster = Cluster(app_name, port)
            with cluster.http:
                yield cluster
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 0
            assert not cluster.replicas()


@pytest.fixture(scope="module")
def two_replicas(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log = tmp_path_factory.mktemp("cluster") / "log"
    with deployed(tiny_llama, log, "--min-replicas=2") as cluster:
        yield cluster


def test_both_replicas_answer_and_conversations_stay_with_one(two_replicas: Cluster) -> None:
    before = two_replicas.series("cllm_cached_prompt_tokens_total")
    for index in range(10):
        contents = [f"{index}: what is it?"]
        answers = []
        for _ in range(3):
            answered = two_replicas.chat(*contents)
            assert answered.status_code == 200, answered.text
            assert answered.headers["X-Request-Id"].count("-") == 4
            answers.append(answered.json())
            contents += [answers[-1]["choices"][0]["message"]["content"], "Go on."]
        assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 for answer in answers[1:]] == [True, True]
    requests = two_replicas.series("cllm_requests_total")
    assert len(requests) == 2
    assert min(requests.values()) >= 3
    assert two_replicas.series("cllm_cached_prompt_tokens_total") != before


def test_errors_of_requests_come_through(two_replicas: Cluster) -> None:
    refused = two_replicas.http.post("/v1/completions", json={"prompt": "x", "temperature": "hot"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    assert two_replicas.http.get("/v1/nothing").status_code == 404


def test_a_client_that_leaves_frees_its_request(two_replicas: Cluster) -> None:
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with two_replicas.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: sum(two_replicas.series("cllm_requests_running").values()) == 0, seconds=5)
    wait_until(lambda: sum(two_replicas.series("cllm_cache_blocks_used").values()) == 0, seconds=5)


def test_a_replica_killed_under_load_costs_its_own_requests_and_is_replaced(two_replicas: Cluster) -> None:
    prompts = [f"Story {index}" for index in range(16)]
    quiet = {prompt: two_replicas.stream(prompt, 300) for prompt in prompts}
    assert {end for _, end in quiet.values()} == {"length"}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        streams = {prompt: pool.submit(two_replicas.stream, prompt, 300) for prompt in prompts}
        wait_until(lambda: min(two_replicas.series("cllm_requests_running").values()) > 0, seconds=30)
        victim = two_replicas.replicas()[0]
        victim.kill()
        ended = {prompt: stream.result() for prompt, stream in streams.items()}
    lost = {prompt for prompt, (_, end) in ended.items() if end == "engine_failed"}
    assert 0 < len(lost) < 16
    assert {prompt: ended[prompt] for prompt in prompts if prompt not in lost} == {
        prompt: quiet[prompt] for prompt in prompts if prompt not in lost
    }
    assert all(quiet[prompt][0].startswith(ended[prompt][0]) for prompt in lost)
    two_replicas.wait_for_replicas(2)
    assert {two_replicas.stream(prompt, 300) for prompt in lost} == {quiet[prompt] for prompt in lost}


def test_an_update_under_load_loses_nothing(two_replicas: Cluster, tiny_llama: Path) -> None:
    old = {process.pid for process in two_replicas.replicas()}
    update = command(
        tiny_llama,
        two_replicas._app_name,
        two_replicas.port,
        ["--address=auto", "--min-replicas=2", "--max-choices=64"],
    )
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = True

        def keep_asking(index: int) -> list[int]:
            statuses: list[int] = []
            while running:
                statuses.append(two_replicas.chat(f"{index}-{len(statuses)}", max_tokens=40).status_code)
            return statuses

        asked = [pool.submit(keep_asking, index) for index in range(4)]
        subprocess.run(update, check=True, capture_output=True, timeout=START_SECONDS)
        wait_until(lambda: not old & {process.pid for process in two_replicas.replicas()}, seconds=120)
        running = False
        statuses = [status for one in asked for status in one.result()]
    assert set(statuses) == {200}
    refused = two_replicas.http.post("/v1/completions", json={"prompt": "x", "n": 65})
    assert "64" in refused.json()["error"]["message"]


def test_replicas_come_with_load_and_go_without_it_and_nothing_is_lost(tiny_llama: Path, tmp_path: Path) -> None:
    scaling = ["--max-replicas=2", "--target-requests=2", "--upscale-delay-seconds=1", "--downscale-delay-seconds=5"]
    with deployed(tiny_llama, tmp_path / "log", *scaling) as cluster:
        assert len(cluster.replicas()) == 1
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            deadline = time.monotonic() + START_SECONDS
            has_scaled = False

            def keep_asking(index: int) -> list[str]:
                ends: list[str] = []
                while not has_scaled or len(ends) < 4:
                    assert time.monotonic() < deadline
                    ends.append(cluster.stream(f"{index} {len(ends)}", 200)[1])
                return ends

            asked = [pool.submit(keep_asking, index) for index in range(8)]
            cluster.wait_for_replicas(2)
            has_scaled = True
            ends = [end for one in asked for end in one.result()]
        assert set(ends) == {"length"}
        cluster.wait_for_replicas(1)
        assert cluster.chat("Still there?").status_code == 200
