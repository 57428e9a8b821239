"""WorkerProcess: a worker process of our own, and the ready-made clients for a supervised and for a remote worker."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from cllm_core.config import EngineConfig
from cllm_core.worker.client import WorkerClient
from cllm_core.worker.endpoint import check_endpoint
from cllm_core.worker.host import RemoteHost
from cllm_core.worker.restart import RestartPolicy

logger = logging.getLogger(__name__)

# How long a worker may take to end by itself: after a crash or failure, after a Shutdown, after SIGTERM.
_EXIT_SECONDS = 0.5
_SHUTDOWN_SECONDS = 3.0
_SIGTERM_SECONDS = 3.0


def supervised_worker(
    config: EngineConfig, *, worker_arguments: Sequence[str] = (), policy: RestartPolicy | None = None
) -> WorkerClient:
    """A client with a worker process of its own, restarted when it dies.

    Args:
        config: sent to the worker.
        worker_arguments: further options of `python -m cllm_core.worker`, such as ("--log-level", "debug").
        policy: when to restart; None is the default policy.
    """
    host = WorkerProcess(config, worker_arguments)
    return WorkerClient(host, max_waiting=config.max_waiting, policy=policy or RestartPolicy())


def remote_worker(endpoint: str, *, max_waiting: int, policy: RestartPolicy | None = None) -> WorkerClient:
    """A client of a worker that was started elsewhere; it reconnects for ever.

    The channel has no authentication: keep the endpoint on loopback or on a private network.

    Raises:
        ConfigError: the endpoint is malformed.
    """
    lasting = RestartPolicy(max_delay=5.0, healthy_seconds=5.0, max_failed_starts=None)
    return WorkerClient(RemoteHost(endpoint), max_waiting=max_waiting, policy=policy or lasting)


class WorkerProcess:
    """A WorkerHost that runs `python -m cllm_core.worker`, reachable by this user only.

    The worker dies with this process: it watches its standard input, whose other end is held here.

    Args:
        config: sent to the worker.
        arguments: further options of the worker's command line.
    """

    def __init__(self, config: EngineConfig, arguments: Sequence[str] = ()) -> None:
        self._config = config
        self._arguments = tuple(arguments)
        self._folder: Path | None = None
        self._num_launches = 0
        self._process: Process | None = None

    @property
    def place(self) -> str:
        """What people call it."""
        return "worker process"

    @property
    def pid(self) -> int | None:
        """Of the process that runs, None where none does."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def launch(self) -> str:
        """Start a process; returns its own new ipc endpoint. OSError, ConfigError: see WorkerHost."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="cllm-"))  # made with mode 0700
        self._num_launches += 1
        endpoint = check_endpoint(f"ipc://{self._folder}/{self._num_launches}.sock")
        self._process = await asyncio.create_subprocess_exec(
            *self._command(endpoint),
            stdin=asyncio.subprocess.PIPE,
            stdout=sys.__stderr__,
            # Out of reach of the terminal's Ctrl-C, which is for us to handle: requests are drained first.
            start_new_session=True,
        )
        logger.info("worker process %d started", self._process.pid)
        return endpoint

    async def wait_gone(self) -> None:
        """Return when the process has ended."""
        if self._process is not None:
            await self._process.wait()

    async def dismiss(self, ask_to_leave: Callable[[], None] | None) -> str:
        """Wait for the end of the process, with more and more force; returns how it ended."""
        if ask_to_leave is not None:
            ask_to_leave()
        await self._exits_within(_EXIT_SECONDS if ask_to_leave is None else _SHUTDOWN_SECONDS)
        self._signal(signal.SIGTERM)
        await self._exits_within(_SIGTERM_SECONDS)
        return await self._kill()

    async def close(self) -> None:
        """Kill what still runs and remove the socket's folder."""
        await self._kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _command(self, endpoint: str) -> list[str]:
        config = msgspec.json.encode(self._config).decode()
        module = [sys.executable, "-m", "cllm_core.worker", "--supervised"]
        return [*module, "--endpoint", endpoint, "--config", config, *self._arguments]

    async def _exits_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wait_gone()

    async def _kill(self) -> str:
        self._signal(signal.SIGKILL)
        await self.wait_gone()
        return describe_exit(None if self._process is None else self._process.returncode)

    def _signal(self, number: signal.Signals) -> None:
        # Not Process.send_signal: it may reap the process behind the back of asyncio, which then misses the exit code.
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def describe_exit(returncode: int | None) -> str:
    """How a worker process ended, for people."""
    if returncode is None:
        return "the worker process was not started"
    if returncode >= 0:
        return f"the worker process ended with exit code {returncode}"
    name = signal.Signals(-returncode).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"the worker process was killed by {name}{hint}"
