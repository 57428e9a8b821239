"""Processor time that serving takes beside the engine: of the API process and of the worker's side of the wire.

    python -m benchmarks.serving_cost MODEL [--requests 100] [--steps 64] [--rounds 3]

A server as `cllm serve` starts it, over a worker whose engine sleeps instead of computing and brings two tokens a step.
Streamed chat completions are sent, one after the other, half of them of one step and half of many: what many cost more
is the time of a step, the rest is the time of a request. Processor time changes little beside other programs, unlike
the tokens per second of `benchmarks.served`, which tell what all of it means with one request in flight.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from benchmarks.served.servers import Endpoint, cllm_server, running
from cllm_core.config import EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.errors import InvalidRequest
from cllm_core.info import EngineStats, ModelInfo
from cllm_core.request import DecodingStats, NewRequest, RequestOutput

_STEP_SECONDS = 0.005
_TOKENS_PER_STEP = 2

# As long as a question of Spider with its schema.
_PROMPT = "Translate to SQL. " + "table singer (singer_id, name, country, age), " * 12 + "How many singers are there?"


class SleepingEngine:
    """Implements cllm_core.worker.loop.StepEngine: repeats the prompt's tokens up to max_tokens, and sleeps for a step.

    Args:
        info: what it claims to have loaded.
    """

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self._running: dict[str, NewRequest] = {}
        self._stats: dict[str, DecodingStats] = {}
        self._leaving: list[str] = []
        self._num_steps = 0
        self._accepted: tuple[int, ...] = ()

    def add_request(self, request: NewRequest) -> None:
        """Queue a request."""
        self._running[request.request_id] = request
        self._stats[request.request_id] = DecodingStats(num_prompt_tokens=len(request.prompt_ids))

    def prepare(self, request: NewRequest) -> None:
        """Nothing takes long."""

    def load_adapter(self, name: str, path: str) -> None:
        """Refused."""
        raise InvalidRequest(f"{name}: this engine serves no adapters")

    def unload_adapter(self, name: str) -> None:
        """Refused."""
        raise InvalidRequest(f"{name}: this engine serves no adapters")

    def abort(self, request_id: str) -> None:
        """Stop a request with the next step."""
        if request_id in self._running:
            self._leaving.append(request_id)

    def has_work(self) -> bool:
        """Whether a request is left."""
        return bool(self._running)

    def step(self) -> list[RequestOutput]:
        """Sleep, then bring every request its next tokens."""
        time.sleep(_STEP_SECONDS)
        self._num_steps += 1
        ended = [self._end(request_id) for request_id in self._leaving if request_id in self._running]
        self._leaving = []
        outputs = [self._advance(request) for request in tuple(self._running.values())]
        self._accepted = tuple(len(output.token_ids) for output in outputs)
        return ended + outputs

    def stats(self) -> EngineStats:
        """Of the latest step."""
        return EngineStats(
            num_running=len(self._running),
            num_steps=self._num_steps,
            step_seconds=_STEP_SECONDS,
            accepted_per_row=self._accepted,
        )

    def _advance(self, request: NewRequest) -> RequestOutput:
        before = self._stats[request.request_id]
        first = before.num_output_tokens
        ids = tuple(request.prompt_ids[(first + i) % len(request.prompt_ids)] for i in range(_TOKENS_PER_STEP))
        stats = DecodingStats(
            num_prompt_tokens=len(request.prompt_ids),
            num_output_tokens=first + _TOKENS_PER_STEP,
            num_forward_passes=before.num_forward_passes + 1,
        )
        self._stats[request.request_id] = stats
        is_last = stats.num_output_tokens >= (request.params.max_tokens or 0)
        if is_last:
            del self._running[request.request_id], self._stats[request.request_id]
        return RequestOutput(
            request_id=request.request_id, token_ids=ids, finish_reason="length" if is_last else None, stats=stats
        )

    def _end(self, request_id: str) -> RequestOutput:
        del self._running[request_id]
        return RequestOutput(request_id=request_id, finish_reason="abort", stats=self._stats.pop(request_id))


def sleeping_engine(config: EngineConfig, on_progress: Callable[[str, float], None]) -> SleepingEngine:
    """The engine of the worker: an EngineFactory."""
    return SleepingEngine(build_engine(config, on_progress).info)


class Cost(msgspec.Struct, frozen=True):
    """Processor time in microseconds."""

    per_request: float
    per_step: float


class Client:
    """One connection that asks for answers of so many steps and reads them to their end."""

    def __init__(self, endpoint: Endpoint) -> None:
        address = endpoint.url.removeprefix("http://")
        self._connection = http.client.HTTPConnection(address, timeout=60)
        self._model = endpoint.model

    def ask(self, num_steps: int) -> None:
        """One streamed chat completion."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": _PROMPT}],
            "max_tokens": num_steps * _TOKENS_PER_STEP,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "include_decoding_stats": True},
        }
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = self._connection.getresponse().read()
        if not answer.endswith(b"data: [DONE]\n\n"):
            raise RuntimeError(f"no whole answer: {answer[-500:]!r}")


def measure(client: Client, process: psutil.Process, *, num_requests: int, num_steps: int) -> Cost:
    """Processor time of a process for this server's requests; half of them have one step and half `num_steps`."""

    def seconds(steps: int) -> float:
        before = process.cpu_times()
        for _ in range(num_requests // 2):
            client.ask(steps)
        after = process.cpu_times()
        return (after.user + after.system - before.user - before.system) / (num_requests // 2)

    short, long = seconds(1), seconds(num_steps)
    per_step = (long - short) / (num_steps - 1)
    return Cost(per_request=1e6 * (short - per_step), per_step=1e6 * per_step)


@contextmanager
def worker(model: str, endpoint: str) -> Iterator[psutil.Process]:
    """A worker process with a SleepingEngine; ended with the block."""
    config = msgspec.json.encode({"model": model}).decode()
    engine = f"benchmarks.serving_cost:{sleeping_engine.__name__}"
    command = [sys.executable, "-m", "cllm_core.worker", "--endpoint", endpoint, "--config", config, "--engine", engine]
    with subprocess.Popen(command) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def read_options() -> argparse.Namespace:
    """The command line; ends the program where it leaves nothing to measure."""
    parser = argparse.ArgumentParser(description="Processor time of serving, without an engine that computes.")
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    # Half of the requests have one step; what the other half costs more is divided by the steps that it has more.
    for name, least in (("requests", 2), ("steps", 2), ("rounds", 1)):
        value = getattr(options, name)
        if value < least:
            parser.error(f"--{name} {value}: must be >= {least}")
    return options


def main() -> None:
    """Run the command line."""
    options = read_options()
    with tempfile.TemporaryDirectory() as folder:
        endpoint = f"ipc://{folder}/worker.sock"
        spec = cllm_server("serving cost", options.model, flags=[f"--worker={endpoint}"], num_threads=None)
        with worker(options.model, endpoint) as far, running(spec, Path(folder) / "server.log") as server:
            client = Client(server)
            [near] = [child for child in psutil.Process().children() if child != far]
            measure(client, near, num_requests=20, num_steps=options.steps)  # warms caches up
            for name, process in (("API process", near), ("worker, its engine asleep", far)):
                costs = [
                    measure(client, process, num_requests=options.requests, num_steps=options.steps)
                    for _ in range(options.rounds)
                ]
                per_request = statistics.median(cost.per_request for cost in costs)
                per_step = statistics.median(cost.per_step for cost in costs)
                print(f"{name}: {per_request:.0f} us a request, {per_step:.0f} us a step")


if __name__ == "__main__":
    main()
