"""What one HTTP request is known by and came to: filled in on its way, written to the access log at its end."""

import time
from dataclasses import dataclass, field
from typing import cast

from starlette.types import Scope

from cllm_core.request import DecodingStats, FinishReason, RequestTimes

from .ignored import IgnoredFields

_STATE_KEY = "cllm_record"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedOutput:
    """One choice that has ended.

    Attributes:
        reason: stop or length; error; abort where the client left or the server did.
        seconds: from the arrival of the request.
        times: in the engine, None where it did not come to a token.
    """

    reason: FinishReason
    seconds: float
    stats: DecodingStats
    times: RequestTimes | None


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request.

    Attributes:
        received_at: time.perf_counter() in seconds.
        model: name of the adapter that decodes for it, else the base's first; empty where none does.
        num_forward_passes: summed over the request's choices, as the token counts are.
        is_aborted: the client left first.
        error: code of the error that the request, or its stream, ended in, None where it did not.
        error_param: field of the request at fault, None where none is.
        outputs: the choices that have ended, in the order of their end.
        ignored: fields of the request that have no effect.
    """

    request_id: str
    received_at: float = field(default_factory=time.perf_counter)
    model: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    num_forward_passes: int = 0
    is_aborted: bool = False
    error: str | None = None
    error_param: str | None = None
    outputs: list[FinishedOutput] = field(default_factory=list)
    ignored: IgnoredFields = field(default_factory=IgnoredFields)

    @property
    def seconds(self) -> float:
        """Time since the request came in."""
        return time.perf_counter() - self.received_at

    @property
    def tokens_per_forward(self) -> float:
        """TPF over all choices; 0.0 where nothing was decoded."""
        return self.num_completion_tokens / self.num_forward_passes if self.num_forward_passes else 0.0


def attach_record(scope: Scope, record: RequestRecord) -> None:
    """Make the record known to whoever handles the request."""
    scope.setdefault("state", {})[_STATE_KEY] = record


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that is being handled."""
    return cast(RequestRecord, scope["state"][_STATE_KEY])
