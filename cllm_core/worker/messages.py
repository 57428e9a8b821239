"""Messages between the API process and the worker process: msgspec structs in MessagePack, never pickle.

API -> worker: Hello, Submit, Abort, LoadAdapter, UnloadAdapter, Ping, Shutdown.
worker -> API: Loading, Ready, StepReport, Rejected, AdapterDone, Alive, Failed.
The first field on the wire is the struct's tag, so each side decodes one union.

    API                                worker
     | -- Hello ------------------------> |
     | <------------- Loading ... Ready - |   the greeting; again with each change of it
     | -- Submit ------------------------> |
     | <------- StepReport, StepReport .. |   or Rejected
     | -- Abort -------------------------> |
     | <--- StepReport: final "abort" --- |
     | -- LoadAdapter, UnloadAdapter ---> |
     | <------------ Ready, AdapterDone - |   Ready to all clients where the served adapters changed
     | -- Ping -------------------------> |
     | <----------------------- Alive --- |   between two steps; also before a step that may take longer
"""

import msgspec

from cllm_core.info import EngineStats, ModelInfo
from cllm_core.request import NewRequest, RequestOutput

PROTOCOL_VERSION = 4
"""Of these messages. Raised with every change that an older peer would misread."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of a client on a new connection; the worker answers with the state it is in."""

    version: int = PROTOCOL_VERSION


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Take this request. The worker answers with RequestOutputs, the last of which has a finish_reason."""

    request: NewRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop these requests and free their blocks. Each running one still ends in one output ("abort")."""

    request_ids: tuple[str, ...]


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Serve the adapter at `path`, as the worker sees it, under this name; answered by one AdapterDone."""

    call_id: str
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Take no more requests for this adapter; those that run finish first. Answered at once by one AdapterDone."""

    call_id: str
    name: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answer with Alive as soon as the step that is being computed ends."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave at once; requests that run get finish_reason "abort"."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    """The model is being loaded: what is done now, and how much of the whole (0..1)."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded; requests may come."""

    info: ModelInfo


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """What the steps since the last report brought to a client's requests, in one message.

    Attributes:
        outputs: one of each request that got anything.
        steps: figures of the steps, oldest first, at least one; the last ones are the state now. Steps that brought the
            client's requests nothing come as one, with the rows of all.
    """

    outputs: tuple[RequestOutput, ...]
    steps: tuple[EngineStats, ...]


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The worker did not take this request; it ends here.

    Attributes:
        is_internal: the fault is the worker's, not the request's.
    """

    request_id: str
    error: str
    is_internal: bool = False


class AdapterDone(msgspec.Struct, frozen=True, tag=True):
    """The answer to the LoadAdapter or UnloadAdapter of this id; nothing changed where there is an error."""

    call_id: str
    error: str | None = None


class Alive(msgspec.Struct, frozen=True, tag=True):
    """The worker is not hung.

    Attributes:
        deadline: seconds within which the next message comes; a worker that is silent for longer is hung.
        is_answer: whether this answers a Ping; else it is a notice that the next step may take longer than the last.
    """

    deadline: float
    is_answer: bool


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot serve any more: loading failed, the device did, or it cannot understand this client.

    Restarting helps only if retry is true.
    """

    error: str
    retry: bool


ToWorker = Hello | Submit | Abort | LoadAdapter | UnloadAdapter | Ping | Shutdown
FromWorker = Loading | Ready | StepReport | Rejected | AdapterDone | Alive | Failed
