"""Where a worker comes from, and whether a lost one is replaced.

WorkerProcess is a process of our own, RemoteWorker one that somebody else keeps alive. WorkerClient uses both alike:
launch, then wait_exited and dismiss, then perhaps launch again, as RestartPolicy says.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cllm_core.config import EngineConfig
from cllm_core.worker.transport import check_endpoint

logger = logging.getLogger(__name__)

# How long a worker may take to end by itself: after a crash or failure, after a Shutdown, after SIGTERM.
_EXIT_SECONDS = 0.5
_SHUTDOWN_SECONDS = 3.0
_SIGTERM_SECONDS = 3.0
# How long a hung one gets to write its stacks.
_STACK_SECONDS = 0.2

# How often libgomp looks before a waiting thread of torch sleeps: about a millisecond. With its own 300,000, threads
# that wait for one without a processor take the processors from it, and loading takes several times as long.
_GOMP_SPINCOUNT = "20000"

STACK_SIGNAL = signal.SIGUSR1
"""Makes a worker write the stack of every thread to standard error."""


@dataclass(frozen=True, slots=True)
class Loss:
    """How a worker was lost.

    Attributes:
        reason: one line for people.
        retry: whether another worker with the same settings may do better.
        ready_seconds: for how long it served; None where it was never ready.
    """

    reason: str
    retry: bool
    ready_seconds: float | None


class RestartPolicy:
    """Whether and when a lost worker is replaced: the delay doubles with every loss, until one serves for a while.

    Args:
        first_delay: seconds before the first restart.
        max_delay: seconds that the delay grows to.
        healthy_seconds: a worker that served this long resets the delay.
        max_failed_starts: give up after this many starts in a row that were never ready, or where a worker reports
            that retrying is no use; None never gives up.
    """

    def __init__(
        self,
        *,
        first_delay: float = 0.1,
        max_delay: float = 30.0,
        healthy_seconds: float = 60.0,
        max_failed_starts: int | None = 5,
    ) -> None:
        self._first_delay = first_delay
        self._max_delay = max_delay
        self._healthy_seconds = healthy_seconds
        self._max_failed_starts = max_failed_starts
        self._next_delay = first_delay
        self._failed_starts = 0

    def delay_after(self, loss: Loss) -> float | None:
        """Seconds to wait before the next start; None gives up. Call it once for each loss."""
        self._count(loss)
        if self._max_failed_starts is not None and (not loss.retry or self._failed_starts >= self._max_failed_starts):
            return None
        delay = self._next_delay
        self._next_delay = min(2 * delay, self._max_delay)
        return delay

    def _count(self, loss: Loss) -> None:
        if loss.ready_seconds is None:
            self._failed_starts += 1
            return
        self._failed_starts = 0
        if loss.ready_seconds >= self._healthy_seconds:
            self._next_delay = self._first_delay


@dataclass(frozen=True, slots=True)
class _Started:
    """A process, and where it listens or will."""

    process: Process
    endpoint: str


class WorkerProcess:
    """Runs `python -m cllm_core.worker`, reachable by this user only.

    The worker dies with this process: it watches its standard input, whose other end is held here.

    Args:
        config: sent to the worker.
        arguments: further options of the worker's command line.
        standby: keep a second process that has its imports done and becomes the worker when the first one is lost.
    """

    name = "worker process"

    def __init__(self, config: EngineConfig, arguments: Sequence[str] = (), *, standby: bool = False) -> None:
        self._config = config
        self._arguments = tuple(arguments)
        self._has_standby = standby
        self._folder: Path | None = None
        self._num_launches = 0
        self._process: Process | None = None
        self._standby: _Started | None = None
        self._preparing: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the running process, None where there is none."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def launch(self) -> str:
        """Start a process; returns its own new ipc endpoint.

        Raises:
            OSError: the system refuses to start it now.
            ConfigError: it always will.
        """
        started = self._take_standby() or await self._start()
        self._process = started.process
        logger.info("worker process %d started", self._process.pid)
        return started.endpoint

    def prepare_next(self) -> None:
        """Start the standby, where there is to be one; called when the worker is ready."""
        if self._has_standby and self._preparing is None and self._standby is None:
            self._preparing = asyncio.create_task(self._prepare())

    async def wait_exited(self) -> None:
        """Return when the process has ended."""
        if self._process is not None:
            await self._process.wait()

    async def dismiss(self, ask_to_leave: Callable[[], None] | None, *, is_hung: bool = False) -> str:
        """Wait for the end of the process, with more and more force; returns how it ended.

        Args:
            ask_to_leave: sends it a Shutdown; None where it cannot receive one.
            is_hung: do not wait; its log gets the stack of every thread where the process still can write it.
        """
        if is_hung:
            self._signal(STACK_SIGNAL)
            await self._exits_within(_STACK_SECONDS)
            return await self._kill()
        if ask_to_leave is not None:
            ask_to_leave()
        await self._exits_within(_EXIT_SECONDS if ask_to_leave is None else _SHUTDOWN_SECONDS)
        self._signal(signal.SIGTERM)
        await self._exits_within(_SIGTERM_SECONDS)
        return await self._kill()

    async def close(self) -> None:
        """Kill what still runs and remove the socket's folder."""
        self._has_standby = False
        if self._preparing is not None:
            await self._preparing
        if (standby := self._take_standby(wakes=False)) is not None:
            standby.process.kill()
            await standby.process.wait()
        await self._kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def _prepare(self) -> None:
        try:
            self._standby = await self._start("--standby")
        except OSError as error:
            logger.warning("no worker can stand by: %s", error)
        finally:
            self._preparing = None

    def _take_standby(self, *, wakes: bool = True) -> "_Started | None":
        """The standby, woken to become the worker; None where there is none that lives."""
        standby, self._standby = self._standby, None
        if standby is None or standby.process.returncode is not None:
            return None
        if wakes:
            assert standby.process.stdin is not None
            standby.process.stdin.write(b"\n")
        return standby

    async def _start(self, *arguments: str) -> "_Started":
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="cllm-"))  # made with mode 0700
        self._num_launches += 1
        endpoint = check_endpoint(f"ipc://{self._folder}/{self._num_launches}.sock")
        process = await asyncio.create_subprocess_exec(
            *self._command(endpoint),
            *arguments,
            env=worker_environment(os.environ),
            stdin=asyncio.subprocess.PIPE,
            stdout=sys.__stderr__,
            # Out of reach of the terminal's Ctrl-C, which is for us to handle: requests are drained first.
            start_new_session=True,
        )
        return _Started(process, endpoint)

    def _command(self, endpoint: str) -> list[str]:
        config = msgspec.json.encode(self._config).decode()
        module = [sys.executable, "-m", "cllm_core.worker", "--supervised"]
        return [*module, "--endpoint", endpoint, "--config", config, *self._arguments]

    async def _exits_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wait_exited()

    async def _kill(self) -> str:
        self._signal(signal.SIGKILL)
        await self.wait_exited()
        return describe_exit(None if self._process is None else self._process.returncode)

    def _signal(self, number: signal.Signals) -> None:
        # Not Process.send_signal: it may reap the process behind the back of asyncio, which then misses the exit code.
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class RemoteWorker:
    """A worker that someone else started and keeps alive. It serves other servers too, so it is never shut down.

    Args:
        endpoint: tcp://HOST:PORT or ipc://PATH.

    Raises:
        ConfigError: the endpoint is malformed.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = check_endpoint(endpoint)
        self.name = f"worker at {endpoint}"

    @property
    def pid(self) -> int | None:
        """None: it may run on another machine."""
        return None

    def prepare_next(self) -> None:
        """Do nothing: whoever started it may keep another one."""

    async def launch(self) -> str:
        """The endpoint; ZeroMQ keeps trying to connect until a worker listens."""
        return self._endpoint

    async def wait_exited(self) -> None:
        """Never return: only the connection shows whether it is there."""
        await asyncio.get_running_loop().create_future()

    async def dismiss(self, ask_to_leave: Callable[[], None] | None, *, is_hung: bool = False) -> str:
        """Do nothing: the worker aborts our requests when the connection closes."""
        return f"the connection to the {self.name} was lost"

    async def close(self) -> None:
        """Do nothing: there is nothing to give back."""


def worker_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Of a worker process: ours, with a short spin of waiting threads unless it says how they wait."""
    if "GOMP_SPINCOUNT" in own or "OMP_WAIT_POLICY" in own:
        return dict(own)
    return {**own, "GOMP_SPINCOUNT": _GOMP_SPINCOUNT}


def describe_exit(returncode: int | None) -> str:
    """How a worker process ended, for people."""
    if returncode is None:
        return "the worker process was not started"
    if returncode >= 0:
        return f"the worker process ended with exit code {returncode}"
    name = signal.Signals(-returncode).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"the worker process was killed by {name}{hint}"
