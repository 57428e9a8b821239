"""Workers in threads and in processes, clients of both, and the small waits that the tests of this folder share."""

import asyncio
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from cllm_core.config import EngineConfig
from cllm_core.worker.client import WorkerClient, remote_worker
from cllm_core.worker.engine_client import EngineState
from cllm_core.worker.loop import WorkerLoop
from cllm_core.worker.messages import Loading, Ready
from cllm_core.worker.queue_limits import QueueLimits
from cllm_core.worker.supervisor import RestartPolicy, WorkerProcess
from cllm_core.worker.transport import WorkerSocket
from tests.worker.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
FAKE_ENGINE = "tests.worker.fake_engine:build"

StartSupervised = Callable[..., Coroutine[Any, Any, tuple[WorkerClient, WorkerProcess]]]


class ThreadWorker:
    """A WorkerLoop over a fake engine, in a thread of this process."""

    def __init__(self, endpoint: str, *, stream_interval: float = 0.0) -> None:
        self.endpoint = endpoint
        self._stream_interval = stream_interval
        self.engine = FakeEngine(EngineConfig(max_num_seqs=2))
        self.channel = WorkerSocket(endpoint, Loading("starting", 0.0))
        self._bell, self._rope = socket.socketpair()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._rope.send(b"!")
        self._thread.join()
        self._bell.close()
        self._rope.close()

    def _serve(self) -> None:
        with self.channel as channel:
            channel.wake_on(self._bell)
            channel.announce(Ready(self.engine.info))
            WorkerLoop(self.engine, channel, self._stop.is_set, stream_interval=self._stream_interval).run()


@pytest.fixture
def endpoint() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="cllm-test-") as folder:
        yield f"ipc://{folder}/worker.sock"


@pytest.fixture
def tcp_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def worker(endpoint: str) -> Iterator[ThreadWorker]:
    worker = ThreadWorker(endpoint)
    yield worker
    worker.stop()


@pytest.fixture
async def client(worker: ThreadWorker) -> AsyncIterator[WorkerClient]:
    """Connected to `worker`, with room for 2 running and 2 waiting requests."""
    client = remote_worker(worker.endpoint, max_waiting=2)
    await client.start()
    await reaches(client, "ready")
    yield client
    await client.stop()


@pytest.fixture
async def start_supervised(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartSupervised]:
    """Factory of clients with a worker process of their own; quick to restart, stopped after the test."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    clients: list[WorkerClient] = []

    async def start(
        engine: str = FAKE_ENGINE, *, max_failed_starts: int = 3, step_timeout: float | None = None
    ) -> tuple[WorkerClient, WorkerProcess]:
        policy = RestartPolicy(first_delay=0.01, max_delay=0.05, max_failed_starts=max_failed_starts)
        host = WorkerProcess(
            EngineConfig(stream_interval=0.0, step_timeout=step_timeout), ("--engine", engine, "--log-level", "error")
        )
        client = WorkerClient(host, limits=QueueLimits(max_waiting=100), policy=policy)
        clients.append(client)
        await client.start()
        return client, host

    yield start
    for client in clients:
        await client.stop()


async def reaches(client: WorkerClient, state: EngineState, *, seconds: float = 20.0) -> None:
    await happens(lambda: client.status.state == state, seconds=seconds)


async def happens(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (any condition, not only one that could set an event)
            await asyncio.sleep(0.005)
