"""A replica: the whole app with a worker of its own, called with requests instead of listening for them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

from starlette.types import Message

from cllm_core.errors import EngineUnavailable
from cllm_core.heap import freeze_garbage_collector
from cllm_core.logs import configure_logging

from ..app import create_app
from ..cli.serve import make_engine
from ..ops.metrics import Metrics
from ..settings import ServerSettings
from .calls import HttpCall, answer

_POLL_SECONDS = 0.1


class Replica:
    """One app.

    Args:
        settings: of the server; host and port mean nothing here.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._engine = make_engine(settings)
        self._app = create_app(self._engine, settings)
        self._metrics: Metrics = self._app.state.services.metrics
        self._running = AsyncExitStack()
        configure_logging(level=settings.log_level, log_format=settings.log_format)

    async def start(self) -> None:
        """Load the model.

        Raises:
            EngineUnavailable: it cannot be loaded; the message tells why.
        """
        await self._running.enter_async_context(self._app.router.lifespan_context(self._app))
        while self._engine.status.state != "ready":
            self.check()
            await asyncio.sleep(_POLL_SECONDS)
        freeze_garbage_collector()

    def check(self) -> None:
        """Raises EngineUnavailable if the worker failed for good."""
        status = self._engine.status
        if status.state in ("failed", "stopped"):
            raise EngineUnavailable(f"the worker cannot be started: {status.detail}")

    async def answer(self, call: HttpCall) -> AsyncGenerator[list[Message]]:
        """The app's ASGI messages."""
        async for messages in answer(self._app, call):
            yield messages

    def metrics(self) -> str:
        """In Prometheus' text format."""
        return self._metrics.render().decode()

    async def stop(self) -> None:
        """Let requests end, then the worker."""
        await self._running.aclose()
