"""A real uvicorn server in a thread, on a free port of the loopback interface."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import httpx
from openai import AsyncOpenAI, OpenAI

from server.cli.serve import DrainingServer
from server.settings import ServerSettings
from tests.server.fakes import ScriptedEngine

T = TypeVar("T")

START_SECONDS = 10.0


class RunningServer:
    """A server that answers, and the engine behind it."""

    def __init__(
        self,
        engine: ScriptedEngine,
        server: DrainingServer,
        loop: asyncio.AbstractEventLoop,
        clients: ExitStack,
    ) -> None:
        self.engine = engine
        self._clients = clients
        self._server = server
        self._loop = loop
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}"
        self.shared_http = clients.enter_context(self.http())

    def http(self, **headers: str) -> httpx.Client:
        """A plain HTTP client."""
        return httpx.Client(base_url=self.url, headers=headers, timeout=10, verify=False)

    def openai(self, api_key: str = "none") -> OpenAI:
        """The official client; closed with the server."""
        client = OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=10)
        return self._clients.enter_context(client)

    def async_openai(self) -> AsyncOpenAI:
        """The official asynchronous client, for the caller to close."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=10)

    def in_loop(self, call: Callable[[], T]) -> T:
        """The result of a call made in the server's event loop, where the engine lives."""

        async def run() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=10)

    def terminate(self) -> None:
        """Do what SIGTERM does."""
        self._server.should_exit = True


@contextmanager
def running(engine: ScriptedEngine, **settings: object) -> Iterator[RunningServer]:
    """Serve an engine with these settings for the time of the block."""
    server = DrainingServer(engine, ServerSettings.model_validate({"port": 0, "drain_seconds": 5.0, **settings}))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        wait_until(lambda: server.started)
        with ExitStack() as clients:
            yield RunningServer(engine, server, loops[0], clients)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server did not end"


def wait_until(condition: Callable[[], bool], *, seconds: float = START_SECONDS) -> None:
    """Wait for something that another thread brings about; AssertionError where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
