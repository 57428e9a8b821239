"""AdapterCalls: requests to a worker to load and unload adapters, and those that the next worker has to be sent again.

Knows no sockets; lives in one event loop.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterable

from cllm_core.errors import EngineUnavailable, InvalidRequest
from cllm_core.info import ModelInfo
from cllm_core.worker.messages import AdapterDone, LoadAdapter, UnloadAdapter

logger = logging.getLogger(__name__)

AdapterCall = LoadAdapter | UnloadAdapter


class AdapterCalls:
    """Numbers calls, resolves the future of each with its answer, and remembers the changes since the start."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: dict[str, tuple[AdapterCall, asyncio.Future[None]]] = {}
        self._restoring: dict[str, AdapterCall] = {}
        self._changes: dict[str, str | None] = {}  # path by name; None: unloaded

    @property
    def is_restoring(self) -> bool:
        """Whether calls of `restore` have no answer yet."""
        return bool(self._restoring)

    def load(self, name: str, path: str) -> tuple[LoadAdapter, asyncio.Future[None]]:
        """A call to send, and its result: None, InvalidRequest or EngineUnavailable."""
        call = LoadAdapter(self._next_id(), name, path)
        return call, self._expect(call)

    def unload(self, name: str) -> tuple[UnloadAdapter, asyncio.Future[None]]:
        """As `load`."""
        call = UnloadAdapter(self._next_id(), name)
        return call, self._expect(call)

    def restore(self, info: ModelInfo) -> list[AdapterCall]:
        """Calls that make a new worker, which serves what `info` lists, serve the adapters of the last one."""
        served = {adapter.name: adapter.path for adapter in info.adapters}
        changed = {name: path for name, path in self._changes.items() if served.get(name) != path}
        for name in changed.keys() & served.keys():  # first: they free slots
            self._restore(UnloadAdapter(self._next_id(), name))
        for name, path in changed.items():
            if path is not None:
                self._restore(LoadAdapter(self._next_id(), name, path))
        return list(self._restoring.values())

    def settle(self, answer: AdapterDone) -> None:
        """Handle the answer to a call."""
        restored = self._restoring.pop(answer.call_id, None)
        if restored is not None:
            if answer.error is not None:
                logger.error("adapter %s is not served after the restart: %s", restored.name, answer.error)
            return
        call, future = self._waiting.pop(answer.call_id)
        if answer.error is None:
            self._changes[call.name] = call.path if isinstance(call, LoadAdapter) else None
        if future.cancelled():
            return
        if answer.error is None:
            future.set_result(None)
        else:
            future.set_exception(InvalidRequest(answer.error))

    def fail_all(self, reason: str) -> None:
        """End every call, for a worker that is gone."""
        self._restoring.clear()
        for future in self._take_futures():
            if not future.cancelled():
                future.set_exception(EngineUnavailable(reason))

    def _take_futures(self) -> Iterable[asyncio.Future[None]]:
        waiting, self._waiting = self._waiting, {}
        return [future for _, future in waiting.values()]

    def _next_id(self) -> str:
        return str(next(self._numbers))

    def _expect(self, call: AdapterCall) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[call.call_id] = call, future
        return future

    def _restore(self, call: AdapterCall) -> None:
        self._restoring[call.call_id] = call
