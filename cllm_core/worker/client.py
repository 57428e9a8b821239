"""WorkerClient: the EngineClient of the server, for a worker process of its own or for a remote worker.

Runs in one event loop and imports no torch. It greets the worker, hands out streams, ends them when the worker is lost,
and starts or reaches the next one as the RestartPolicy says.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import zmq.asyncio

from cllm_core.config import EngineConfig
from cllm_core.errors import ConfigError, EngineUnavailable
from cllm_core.info import EngineStats, ModelInfo
from cllm_core.request import ErrorCode, NewRequest, RequestOutput
from cllm_core.worker.adapters import AdapterCalls
from cllm_core.worker.crashes import CrashedPrompts
from cllm_core.worker.engine_client import EngineState, EngineStatus
from cllm_core.worker.messages import (
    Abort,
    AdapterDone,
    Alive,
    Failed,
    Hello,
    Loading,
    Ping,
    Ready,
    Rejected,
    Shutdown,
    StepReport,
    Submit,
)
from cllm_core.worker.queue_limits import QueueLimits
from cllm_core.worker.streams import LiveStreams
from cllm_core.worker.supervisor import Loss, RemoteWorker, RestartPolicy, WorkerProcess
from cllm_core.worker.transport import Connection, Unreadable
from cllm_core.worker.watchdog import Watchdog

logger = logging.getLogger(__name__)

# A dead worker's last messages are in the socket already; this bounds the wait for the end of the connection.
_LAST_MESSAGES_SECONDS = 1.0

# Requests that are to be run again wait this long for the next worker to be ready.
_RUN_AGAIN_SECONDS = 60.0

_HUNG = "the worker did not end a step within {deadline:g} s and counts as hung (--step-timeout)"


@dataclass(frozen=True, slots=True)
class RequestTimeouts:
    """Limits on the time that a request takes, in seconds from its arrival; None sets none.

    Attributes:
        first_token: to its first output.
        whole: to its end.
    """

    first_token: float | None = None
    whole: float | None = None


def supervised_worker(
    config: EngineConfig,
    *,
    worker_arguments: Sequence[str] = (),
    policy: RestartPolicy | None = None,
    timeouts: RequestTimeouts = RequestTimeouts(),
    max_user_share: float = 1.0,
    standby: bool = False,
) -> "WorkerClient":
    """A client with a worker process of its own, restarted when it dies.

    Args:
        config: sent to the worker.
        worker_arguments: further options of `python -m cllm_core.worker`, such as ("--log-level", "debug").
        policy: when to restart; None is the default policy.
        timeouts: of requests.
        max_user_share: see QueueLimits.
        standby: see WorkerProcess.
    """
    process = WorkerProcess(config, worker_arguments, standby=standby)
    limits = QueueLimits(max_waiting=config.max_waiting, max_user_share=max_user_share)
    return WorkerClient(process, limits=limits, policy=policy or RestartPolicy(), timeouts=timeouts)


def remote_worker(
    endpoint: str,
    *,
    max_waiting: int,
    policy: RestartPolicy | None = None,
    timeouts: RequestTimeouts = RequestTimeouts(),
    max_user_share: float = 1.0,
) -> "WorkerClient":
    """A client of a worker that was started elsewhere; it reconnects without end.

    The connection has no authentication: keep the endpoint on loopback or on a private network.

    Raises:
        ConfigError: the endpoint is malformed.
    """
    lasting = RestartPolicy(max_delay=5.0, healthy_seconds=5.0, max_failed_starts=None)
    limits = QueueLimits(max_waiting=max_waiting, max_user_share=max_user_share)
    return WorkerClient(RemoteWorker(endpoint), limits=limits, policy=policy or lasting, timeouts=timeouts)


class WorkerClient:
    """Implements `cllm_core.worker.engine_client.EngineClient`.

    Args:
        worker: launches or reaches workers.
        limits: of the requests that are alive.
        policy: when a lost worker is replaced.
        timeouts: of requests.
    """

    def __init__(
        self,
        worker: WorkerProcess | RemoteWorker,
        *,
        limits: QueueLimits,
        policy: RestartPolicy,
        timeouts: RequestTimeouts = RequestTimeouts(),
    ) -> None:
        self._worker = worker
        self._policy = policy
        self._limits = limits
        self._timeouts = timeouts
        self._streams = LiveStreams()
        self._crashed = CrashedPrompts()
        self._adapter_calls = AdapterCalls()
        self._listeners: list[Callable[[StepReport], None]] = []
        self._status = EngineStatus(state="starting", detail=f"waiting for the {worker.name}")
        self._closing: Literal["draining", "stopped"] | None = None
        self._info: ModelInfo | None = None
        self._stats = EngineStats()
        self._connection: Connection | None = None
        self._watchdog: Watchdog | None = None
        self._ready_since: float | None = None
        self._became_ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def status(self) -> EngineStatus:
        """Whether requests can be taken."""
        if self._closing is None:
            return self._status
        return msgspec.structs.replace(self._status, state=self._closing)

    @property
    def info(self) -> ModelInfo:
        """The loaded model; the last known one while the worker restarts. EngineUnavailable before the first load."""
        if self._info is None:
            raise EngineUnavailable(self._describe_status())
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The state of the engine after its latest step; zeros where there is no worker."""
        return self._stats

    @property
    def num_requests(self) -> int:
        """Requests that the worker is not done with; those whose reader left count until it confirms."""
        return len(self._streams)

    @property
    def worker_pid(self) -> int | None:
        """The worker's process, None where there is none now or it was started elsewhere."""
        return self._worker.pid

    def max_requests(self, user: str) -> int:
        """How many requests of a user may be alive together; see EngineClient."""
        return self._limits.most(user, self.info.max_num_seqs)

    def add_step_listener(self, listener: Callable[[StepReport], None]) -> None:
        """Call `listener` with every step report, in the event loop. What it raises is logged."""
        self._listeners.append(listener)

    def submit(self, request: NewRequest) -> AsyncGenerator[RequestOutput]:
        """Queue a request; returns its stream at once. See EngineClient.

        Raises:
            EngineUnavailable: the status is not "ready".
            EngineBusy: as many requests are alive, in all or of this user, as may run and wait.
            InvalidRequest: a request of this id is alive, or a value in it cannot be encoded.
            PromptCrashedWorker: its prompt was running in two crashes.
        """
        connection = self._require_ready()
        self._limits.check(
            request.user,
            max_running=self.info.max_num_seqs,
            num_alive=self.num_requests,
            num_of_user=self._streams.num_of_user(request.user),
        )
        self._crashed.check(request)
        payload = connection.encode(Submit(request))
        stream = self._streams.open(request, self._abort)
        connection.send_encoded(payload)
        self._set_timers(request.request_id)
        return stream

    async def load_adapter(self, name: str, path: str) -> None:
        """Serve another adapter; see EngineClient."""
        connection = self._require_ready()
        call, done = self._adapter_calls.load(name, path)
        connection.send(call)
        await done

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; see EngineClient."""
        connection = self._require_ready()
        call, done = self._adapter_calls.unload(name)
        connection.send(call)
        await done

    async def start(self) -> None:
        """Begin to start or reach the worker; returns at once. To be called once."""
        if self._task is not None:
            raise RuntimeError("this client was started before: make a new one")
        self._task = asyncio.create_task(self._run(), name="worker client")

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, wait up to `grace_seconds` for those that run, then end the rest with "abort"."""
        self._closing = self._closing or "draining"
        try:
            async with asyncio.timeout(grace_seconds):
                await self._streams.wait_idle()
        except TimeoutError:
            self._abort(*self._streams.abort_all())

    async def stop(self) -> None:
        """End the worker where it is ours; every open stream ends with "abort" first. May be called twice."""
        self._closing = "stopped"
        self._abort(*self._streams.abort_all())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._worker.close()

    def _require_ready(self) -> Connection:
        if self.status.state != "ready" or self._connection is None:
            raise EngineUnavailable(self._describe_status())
        return self._connection

    def _describe_status(self) -> str:
        status = self.status
        return f"the engine is {status.state}" + (f": {status.detail}" if status.detail else "")

    def _fail_all(self, reason: str) -> None:
        self._streams.fail_all(reason)
        self._adapter_calls.fail_all(reason)

    def _set_timers(self, request_id: str) -> None:
        first_token, whole = self._timeouts.first_token, self._timeouts.whole
        loop = asyncio.get_running_loop()
        if first_token is not None:
            error = f"no token came within {first_token:g} s, the server's limit (--ttft-timeout)"
            loop.call_later(first_token, self._expire, request_id, error, "ttft_timeout")
        if whole is not None:
            error = f"the request took longer than {whole:g} s, the server's limit (--request-timeout)"
            loop.call_later(whole, self._expire, request_id, error, "request_timeout")

    def _expire(self, request_id: str, error: str, code: ErrorCode) -> None:
        if self._streams.expire(request_id, error, code, only_first=code == "ttft_timeout"):
            self._abort(request_id)

    def _abort(self, *request_ids: str) -> None:
        if self._connection is not None and request_ids:
            self._connection.send(Abort(request_ids))

    async def _run(self) -> None:
        """Serve one worker after the other, until the policy gives up or the client closes."""
        try:
            with zmq.asyncio.Context() as context:
                delay: float | None = 0.0
                while delay is not None:
                    await asyncio.sleep(delay)
                    delay = self._delay_after(await self._run_one_worker(context))
        except Exception as error:
            logger.exception("the worker client failed; this is a bug")
            self._set_status("failed", f"the worker client failed: {error}")
        finally:
            self._fail_all(self._describe_status())

    async def _run_one_worker(self, context: zmq.asyncio.Context) -> Loss:
        """From launch to loss."""
        self._ready_since = None
        self._became_ready = asyncio.Event()
        try:
            endpoint = await self._worker.launch()
        except (OSError, ConfigError) as error:
            reason = f"the {self._worker.name} cannot be started: {error}"
            return Loss(reason, retry=isinstance(error, OSError), ready_seconds=None)
        connection = Connection(context, endpoint)
        failure: Failed | None = None
        try:
            failure = await self._serve(connection)
            served = None if self._ready_since is None else time.monotonic() - self._ready_since
        finally:
            how_it_ended = await self._dismiss(connection, is_hung=isinstance(failure, _Hung))
        if failure is None:
            return Loss(how_it_ended, retry=True, ready_seconds=served)
        return Loss(failure.error, retry=failure.retry, ready_seconds=served)

    async def _serve(self, connection: Connection) -> Failed | None:
        """Greet the worker and handle its messages until it is lost; then end its requests, before all else."""
        failure: Failed | None = None
        self._connection = connection
        self._watchdog = Watchdog(lambda: connection.send(Ping()), lambda: not len(self._streams))
        try:
            connection.send(Hello())
            failure = await self._listen(connection)
        finally:
            self._connection = self._watchdog = None
            self._stats = EngineStats()
        reason = failure.error if failure else f"the {self._worker.name} was lost"
        self._set_status("restarting", reason)
        self._lose_requests(reason)
        return failure

    def _lose_requests(self, reason: str) -> None:
        """End the requests of a lost worker, or keep them for the next one."""
        if self._ready_since is not None and self._info is not None:
            self._crashed.record(self._streams.requests[: self._info.max_num_seqs])
        may_run_again = self._closing is None
        self._streams.lose_worker(
            reason, can_run_again=lambda request: may_run_again and not self._crashed.is_refused(request)
        )
        self._adapter_calls.fail_all(reason)
        if len(self._streams):
            logger.info("%d requests without output wait to be run again", len(self._streams))
            asyncio.get_running_loop().call_later(_RUN_AGAIN_SECONDS, self._give_up_waiting, reason)

    def _give_up_waiting(self, reason: str) -> None:
        if self._connection is None or self._ready_since is None:
            self._streams.fail_all(reason)

    def _run_again(self) -> None:
        assert self._connection is not None
        for request in self._streams.take_waiting():
            self._connection.send(Submit(request))

    async def _dismiss(self, connection: Connection, *, is_hung: bool) -> str:
        is_listening = self._closing == "stopped" and self._ready_since is not None
        try:
            return await self._worker.dismiss(
                (lambda: connection.send(Shutdown())) if is_listening else None, is_hung=is_hung
            )
        finally:
            # Not before: a Shutdown that was not sent yet would be dropped.
            connection.close()

    async def _listen(self, connection: Connection) -> Failed | None:
        """Handle messages until the worker sends Failed, hangs, its connection breaks or its process ends."""
        reading = asyncio.create_task(self._read(connection))
        hung = asyncio.create_task(self._wait_hung())
        lost = asyncio.create_task(connection.wait_lost())
        exited = asyncio.create_task(self._worker.wait_exited())
        tasks = {reading, hung, lost, exited}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if exited.done() and connection.is_connected:
                await asyncio.wait({reading, lost}, timeout=_LAST_MESSAGES_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in (reading, hung):
                if task.done():
                    return task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        return self._take_waiting(connection)

    async def _wait_hung(self) -> Failed | None:
        """Watch the worker from the time that it is ready."""
        assert self._watchdog is not None
        await self._became_ready.wait()
        deadline = await self._watchdog.wait_hung()
        return _Hung(_HUNG.format(deadline=deadline), retry=True)

    async def _read(self, connection: Connection) -> Failed:
        """Handle messages as they come, up to Failed."""
        failure: asyncio.Future[Failed] = asyncio.get_running_loop().create_future()

        # Called back by the event loop: a task that waits for each message would have to be woken for it.
        def read() -> None:
            try:
                failed = self._take_waiting(connection)
            except Exception as error:  # belongs to whoever waits for the end of the conversation
                connection.notify(None)
                failure.set_exception(error)
            else:
                if failed is not None:
                    connection.notify(None)
                    failure.set_result(failed)

        connection.notify(read)
        try:
            return await failure
        finally:
            connection.notify(None)

    def _take_waiting(self, connection: Connection) -> Failed | None:
        """Handle the messages that have arrived, up to the first Failed."""
        while (message := connection.receive_waiting()) is not None:
            if self._watchdog is not None:
                self._watchdog.on_message(message)
            if isinstance(message, Failed):
                return message
            if isinstance(message, Unreadable):
                if self._ready_since is None:
                    return Failed(message.error, retry=True)
                self._lose_message(message)
            else:
                self._handle(message)
        return None

    def _handle(self, message: Loading | Ready | StepReport | Rejected | AdapterDone | Alive) -> None:
        match message:
            case StepReport(outputs, steps):
                self._stats = steps[-1]
                for output in outputs:
                    self._deliver(output)
                self._notify_listeners(message)
            case Rejected(request_id, error, is_internal):
                self._streams.reject(request_id, error, is_internal=is_internal)
            case Loading(stage, fraction):
                state: EngineState = "restarting" if self._status.num_restarts else "starting"
                self._set_status(state, stage, progress=fraction)
            case Ready(info):
                self._info = info
                if self._ready_since is None:
                    self._ready_since = time.monotonic()
                    self._became_ready.set()
                    self._worker.prepare_next()
                    self._restore_adapters(info)
                self._become_ready()
            case AdapterDone():
                self._adapter_calls.settle(message)
                self._become_ready()
            case Alive():
                pass  # the watchdog has it

    def _lose_message(self, message: Unreadable) -> None:
        """End the requests that a message was for: tokens of theirs are lost, perhaps the last ones."""
        logger.error("%s", message.error)
        request_ids = message.request_ids or tuple(request.request_id for request in self._streams.requests)
        for request_id in request_ids:
            self._streams.fail(request_id, message.error)
        self._abort(*request_ids)
        if not message.request_ids:
            self._adapter_calls.fail_all(message.error)

    def _deliver(self, output: RequestOutput) -> None:
        ended = self._streams.deliver(output)
        if ended is not None:
            self._limits.on_end()
        if ended is not None and output.finish_reason in ("stop", "length"):
            self._crashed.clear(ended)

    def _restore_adapters(self, info: ModelInfo) -> None:
        """Ask a new worker for the adapters that the last one was asked for."""
        assert self._connection is not None
        for call in self._adapter_calls.restore(info):
            self._connection.send(call)

    def _become_ready(self) -> None:
        if not self._adapter_calls.is_restoring:
            self._set_status("ready", progress=1.0)
            self._run_again()

    def _notify_listeners(self, report: StepReport) -> None:
        for listener in self._listeners:
            try:
                listener(report)
            except Exception:
                logger.exception("a step listener failed")

    def _delay_after(self, loss: Loss) -> float | None:
        """Decide after a loss; the seconds to wait before the next worker, None for no next one."""
        if self._closing is not None:
            return None
        delay = self._policy.delay_after(loss)
        if delay is None:
            logger.error("%s; not started again", loss.reason)
            self._set_status("failed", loss.reason)
            return None
        logger.warning("%s; next try in %.1f s", loss.reason, delay)
        self._set_status("restarting", loss.reason, num_restarts=self._status.num_restarts + 1)
        return delay

    def _set_status(
        self, state: EngineState, detail: str = "", *, progress: float = 0.0, num_restarts: int | None = None
    ) -> None:
        self._status = EngineStatus(
            state=state,
            detail=detail,
            progress=progress,
            num_restarts=self._status.num_restarts if num_restarts is None else num_restarts,
        )


class _Hung(Failed, frozen=True):
    """The watchdog's: the worker is to be killed."""
