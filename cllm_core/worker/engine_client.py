"""EngineClient: the engine as the server sees it, the one seam between HTTP and the worker, and for fakes in tests."""

from collections.abc import AsyncGenerator, Callable
from typing import Literal, Protocol

import msgspec

from cllm_core.info import EngineStats, ModelInfo
from cllm_core.request import NewRequest, RequestOutput
from cllm_core.worker.messages import StepReport

EngineState = Literal["starting", "ready", "restarting", "draining", "failed", "stopped"]


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests can be taken, for /health and /ready.

    Attributes:
        state: ready takes requests; starting and restarting will, draining and stopped will not; failed needs an
            operator.
        detail: one line for people: the loading stage, or why there is no worker.
        progress: of loading, 0..1.
        num_restarts: times the worker died and was started again.
    """

    state: EngineState
    detail: str = ""
    progress: float = 0.0
    num_restarts: int = 0


class EngineClient(Protocol):
    """Hands requests to a worker and gives each its own stream of outputs."""

    @property
    def status(self) -> EngineStatus:
        """Whether requests can be taken."""
        ...

    @property
    def info(self) -> ModelInfo:
        """The loaded model; the last known one while the worker restarts. EngineUnavailable before the first load."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The state of the engine after its latest step."""
        ...

    @property
    def worker_pid(self) -> int | None:
        """The worker's process on this machine; None where there is none now, or it is not this client's."""
        ...

    def max_requests(self, user: str) -> int:
        """How many requests of a user may be alive together; "" is nobody in particular. Raises as `info`."""
        ...

    def submit(self, request: NewRequest) -> AsyncGenerator[RequestOutput]:
        """Queue a request; returns at once.

        The stream ends after exactly one output with a finish_reason ("error" where the worker dies). Closing it
        early (`aclose`, or cancellation of its reader) aborts the request and frees its blocks.

        Raises:
            EngineBusy: the queue is full, or the user's part of it.
            EngineUnavailable: the status is not "ready".
        """
        ...

    def add_step_listener(self, listener: Callable[[StepReport], None]) -> None:
        """Call `listener` with every step report, in the event loop."""
        ...

    async def load_adapter(self, name: str, path: str) -> None:
        """Serve another adapter beside the base; once this returns, `info` lists it and requests may name it.

        A worker that is restarted gets it again.

        Args:
            name: to serve it under.
            path: of its folder, as the worker sees it; below the worker's adapter_root.

        Raises:
            InvalidRequest: the worker refuses it; the message gives the reason.
            EngineUnavailable: the status is not "ready", or the worker was lost meanwhile.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for this adapter; those that run finish with it. Raises as load_adapter."""
        ...

    async def start(self) -> None:
        """Begin to start or reach the worker; returns at once; `status` shows the progress."""
        ...

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, wait up to `grace_seconds` for those that run, then abort the rest."""
        ...

    async def stop(self) -> None:
        """End the worker; every open stream ends with its final output first."""
        ...
