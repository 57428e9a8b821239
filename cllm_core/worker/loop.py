"""WorkerLoop: drives the engine for the clients of a WorkerSocket, one step at a time, and reports the outputs.

It knows which client owns which request; it never looks into an output beyond its finish_reason.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import msgspec

from cllm_core.errors import CllmError, RequestError, describe_error
from cllm_core.info import EngineStats, ModelInfo
from cllm_core.request import DecodingStats, NewRequest, RequestOutput
from cllm_core.worker.messages import (
    Abort,
    AdapterDone,
    Alive,
    LoadAdapter,
    Ping,
    Ready,
    Rejected,
    Shutdown,
    StepReport,
    Submit,
    UnloadAdapter,
)
from cllm_core.worker.outbox import Outbox
from cllm_core.worker.transport import ClientId, Command, WorkerSocket

logger = logging.getLogger(__name__)

# How often an idle loop checks whether a request has been prepared.
_PREPARING_SECONDS = 0.005
# How long loading an adapter may take before the worker counts as hung.
_ADAPTER_SECONDS = 600.0


class StepEngine(Protocol):
    """What the loop needs of an engine; `cllm_core.engine.engine.Engine` is one."""

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        ...

    def add_request(self, request: NewRequest) -> None:
        """Queue a request; RequestError where this model cannot take it."""
        ...

    def prepare(self, request: NewRequest) -> Future[None] | None:
        """Begin, on another thread, what `add_request` would take long for; None where it would not."""
        ...

    def load_adapter(self, name: str, path: str) -> None:
        """Serve another adapter; `info` lists it then. CllmError where it cannot be used."""
        ...

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; CllmError where none is served under this name."""
        ...

    def abort(self, request_id: str) -> None:
        """Stop a request; its final "abort" output comes with the next step. No-op where unknown."""
        ...

    def step(self) -> list[RequestOutput]:
        """Compute one step; may be called when only aborted requests are left."""
        ...

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    def stats(self) -> EngineStats:
        """The state after the latest step."""
        ...

    def step_deadline(self) -> float:
        """Seconds after which the next step counts as hung; may be infinite."""
        ...


class WorkerLoop:
    """Serves until a client says Shutdown or `should_stop` turns true; then ends every request with "abort".

    Args:
        engine: driven by this loop alone.
        socket: not closed by the loop.
        should_stop: checked whenever the socket was read.
        stream_interval: see EngineConfig.
    """

    def __init__(
        self,
        engine: StepEngine,
        socket: WorkerSocket,
        should_stop: Callable[[], bool],
        *,
        stream_interval: float = 0.0,
    ) -> None:
        self._engine = engine
        self._socket = socket
        self._should_stop = should_stop
        self._shutdown = False
        self._owners: dict[str, ClientId] = {}
        self._preparing: dict[str, _Preparing] = {}
        self._every_step: set[str] = set()  # requests whose outputs are sent after every step
        self._deadline = 0.0  # the latest that clients were sent
        self._outboxes: defaultdict[ClientId, Outbox] = defaultdict(lambda: Outbox(stream_interval))

    def run(self) -> None:
        """Serve to the end. Exceptions of the engine's step() pass through, after what the steps before it brought."""
        try:
            self._serve()
        finally:
            self._send_rest()

    def _serve(self) -> None:
        while not self._should_exit():
            commands = self._socket.receive(self._wait_seconds())
            # An adapter to load holds the loop up, and so does a prompt to read.
            if any(isinstance(command, Submit | LoadAdapter | UnloadAdapter) for _, command in commands):
                self._send_outputs()
            for client, command in commands:
                self._handle(client, command)
            self._add_prepared()
            if self._has_work():
                if self._can_admit():
                    self._send_outputs()
                self._announce_deadline(self._engine.step_deadline())
                self._report(self._engine.step())
        self._abort((*self._owners, *self._preparing))
        if self._has_work():
            self._report(self._engine.step())

    def _should_exit(self) -> bool:
        return self._shutdown or self._should_stop()

    def _has_work(self) -> bool:
        # Owned requests count too: an aborted one may leave no work, but its last output is still owed.
        return bool(self._owners) or self._engine.has_work()

    def _wait_seconds(self) -> float | None:
        """How long to wait for a command: None for as long as it takes."""
        if self._has_work():
            return 0
        return _PREPARING_SECONDS if self._preparing else None

    def _can_admit(self) -> bool:
        """Whether the next step may begin to read a prompt, and take as long as many others."""
        now = self._engine.stats()
        return now.num_waiting > 0 and now.num_running < self._engine.info.max_num_seqs

    def _handle(self, client: ClientId, command: Command) -> None:
        match command:
            case Submit(request):
                self._submit(client, request)
            case Abort(request_ids):
                self._abort(id for id in request_ids if self._owner_of(id) == client)
            case Ping():
                self._deadline = self._engine.step_deadline()
                self._socket.send(client, Alive(self._deadline, is_answer=True))
            case LoadAdapter(call_id, name, path):
                self._announce_deadline(_ADAPTER_SECONDS)
                self._change_adapters(client, call_id, lambda: self._engine.load_adapter(name, path))
            case UnloadAdapter(call_id, name):
                self._change_adapters(client, call_id, lambda: self._engine.unload_adapter(name))
            case Shutdown():
                self._shutdown = True

    def _submit(self, client: ClientId, request: NewRequest) -> None:
        """Add a request, once what would delay the steps of others is done."""
        try:
            prepared = self._engine.prepare(request)
        except Exception as error:
            self._reject(client, request, error)
            return
        if prepared is None or prepared.done():
            self._add(client, request)
        else:
            self._preparing[request.request_id] = _Preparing(client, request, prepared)

    def _add_prepared(self) -> None:
        for waiting in [waiting for waiting in self._preparing.values() if waiting.prepared.done()]:
            del self._preparing[waiting.request.request_id]
            self._add(waiting.client, waiting.request)

    def _owner_of(self, request_id: str) -> ClientId | None:
        waiting = self._preparing.get(request_id)
        return self._owners.get(request_id) if waiting is None else waiting.client

    def _add(self, client: ClientId, request: NewRequest) -> None:
        try:
            self._engine.add_request(request)
        except Exception as error:
            self._reject(client, request, error)
        else:
            self._owners[request.request_id] = client
            # A draft is shown while it lasts; what is decoded behind a stop string is thrown away.
            if request.wants_draft or request.params.stop:
                self._every_step.add(request.request_id)

    def _reject(self, client: ClientId, request: NewRequest, error: Exception) -> None:
        """End a request that the engine did not take; whatever the reason is, the others go on."""
        if isinstance(error, RequestError):
            self._socket.send(client, Rejected(request.request_id, str(error)))
            return
        logger.error("request %s cannot be taken", request.request_id, exc_info=error)
        self._socket.send(client, Rejected(request.request_id, describe_error(error), is_internal=True))

    def _announce_deadline(self, seconds: float) -> None:
        """Send it to all clients before something that may take longer than they know."""
        if seconds > self._deadline:
            self._deadline = seconds
            for client in self._socket.clients:
                self._socket.send(client, Alive(seconds, is_answer=False))

    def _change_adapters(self, client: ClientId, call_id: str, change: Callable[[], None]) -> None:
        """Announce the change to all clients before the one that asked gets its answer."""
        error: str | None = None
        try:
            change()
        except CllmError as refusal:
            error = str(refusal)
        except Exception as failure:  # a client named the files: what is wrong with them must not end other requests
            logger.exception("an adapter cannot be loaded")
            error = describe_error(failure)
        else:
            self._socket.announce(Ready(self._engine.info))
        self._socket.send(client, AdapterDone(call_id, error))

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in tuple(request_ids):
            if waiting := self._preparing.pop(request_id, None):
                self._report_end(waiting)
            else:
                self._engine.abort(request_id)

    def _report_end(self, waiting: "_Preparing") -> None:
        """The end of a request that was aborted before the engine had it."""
        stats = DecodingStats(num_prompt_tokens=len(waiting.request.prompt_ids))
        output = RequestOutput(request_id=waiting.request.request_id, finish_reason="abort", stats=stats)
        # Figures without a step's rows: they were reported with the step.
        figures = msgspec.structs.replace(self._engine.stats(), accepted_per_row=(), adapter_per_row=())
        self._socket.send(waiting.client, StepReport((output,), (figures,)))

    def _report(self, outputs: list[RequestOutput]) -> None:
        step = self._engine.stats()
        by_client = self._by_client(outputs)
        for client in self._socket.clients:
            outbox, mine = self._outboxes[client], by_client[client]
            outbox.add(mine, step, urgent=any(output.request_id in self._every_step for output in mine))
            self._send(client, outbox.take_due() if self._has_work() else outbox.take())
        self._drop_requests_except_of(self._socket.clients)

    def _send(self, client: ClientId, report: StepReport | None) -> None:
        if report is not None:
            self._socket.send(client, report)

    def _drop_requests_except_of(self, clients: Collection[ClientId]) -> None:
        """Abort the requests of clients that were found disconnected by any send."""
        for gone in self._outboxes.keys() - clients:
            del self._outboxes[gone]
        for waiting in [waiting for waiting in self._preparing.values() if waiting.client not in clients]:
            del self._preparing[waiting.request.request_id]
        self._abort(id for id, owner in self._owners.items() if owner not in clients)

    def _send_outputs(self) -> None:
        """Send outputs that are there before something that takes long."""
        for client, outbox in tuple(self._outboxes.items()):
            if outbox.has_outputs:
                self._send(client, outbox.take())

    def _send_rest(self) -> None:
        for client, outbox in tuple(self._outboxes.items()):
            self._send(client, outbox.take())

    def _by_client(self, outputs: list[RequestOutput]) -> defaultdict[ClientId, list[RequestOutput]]:
        by_client: defaultdict[ClientId, list[RequestOutput]] = defaultdict(list)
        for output in outputs:
            by_client[self._owners[output.request_id]].append(output)
            if output.finish_reason is not None:
                del self._owners[output.request_id]
                self._every_step.discard(output.request_id)
        return by_client


@dataclass(frozen=True, slots=True)
class _Preparing:
    """A request that waits for what other threads do for it."""

    client: ClientId
    request: NewRequest
    prepared: Future[None]
