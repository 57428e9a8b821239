"""Where a worker comes from: WorkerHost is what the client asks of its surroundings, RemoteHost the simple case.

The other host, a process of our own, is `cllm_core.worker.supervisor.WorkerProcess`.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from cllm_core.worker.endpoint import check_endpoint


class WorkerHost(Protocol):
    """Brings one worker after another: launch, then wait_gone and dismiss, then perhaps launch again."""

    @property
    def place(self) -> str:
        """What is being started or reached, for people."""
        ...

    async def launch(self) -> str:
        """Bring up a worker; returns the endpoint where it listens now or soon.

        Raises:
            OSError: the system refuses now.
            ConfigError: it always will.
        """
        ...

    async def wait_gone(self) -> None:
        """Return when the worker is known to be dead. Waits forever where only its connection can tell."""
        ...

    async def dismiss(self, ask_to_leave: Callable[[], None] | None) -> str:
        """Make sure that the worker of the last launch no longer works for us; returns how it ended, for people.

        Args:
            ask_to_leave: sends it a Shutdown; None where it cannot hear us. A host that does not own the worker
                leaves it running.
        """
        ...

    async def close(self) -> None:
        """Give back what the host holds. Follows the last dismiss."""
        ...


class RemoteHost:
    """A worker that someone else started and keeps alive. It serves other servers too, so it is never shut down.

    The channel has no authentication: keep the endpoint on loopback or on a private network.

    Args:
        endpoint: tcp://HOST:PORT or ipc://PATH.

    Raises:
        ConfigError: the endpoint is malformed.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = check_endpoint(endpoint)

    @property
    def place(self) -> str:
        """The endpoint."""
        return f"worker at {self._endpoint}"

    async def launch(self) -> str:
        """The endpoint; ZeroMQ keeps trying to connect until somebody listens."""
        return self._endpoint

    async def wait_gone(self) -> None:
        """Never returns: the link tells."""
        await asyncio.get_running_loop().create_future()

    async def dismiss(self, ask_to_leave: Callable[[], None] | None) -> str:
        """Nothing to do; the worker aborts our requests when the connection closes."""
        return f"the connection to the {self.place} was lost"

    async def close(self) -> None:
        """Nothing to give back."""
