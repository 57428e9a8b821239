"""Messages between the API process and the worker process: msgspec structs in MessagePack, never pickle.

API -> worker: Submit, Abort, Shutdown.     worker -> API: Loading, Ready, StepReport, Failed.
The first field on the wire is the struct's tag, so each side decodes one union.
"""

import msgspec

from cllm_core.info import EngineStats, ModelInfo
from cllm_core.request import NewRequest, RequestOutput


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Take this request. The worker answers with RequestOutputs, the last of which has a finish_reason."""

    request: NewRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop these requests and free their blocks. Each running one still ends in one output ("abort")."""

    request_ids: tuple[str, ...]


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
    """What one step brought to all requests, in one message."""

    outputs: tuple[RequestOutput, ...]
    stats: EngineStats


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot go on and leaves: loading failed, or the device did. Restarting helps only if retry is true."""

    error: str
    retry: bool


ToWorker = Submit | Abort | Shutdown
FromWorker = Loading | Ready | StepReport | Failed
