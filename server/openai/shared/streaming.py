"""How a generation reaches its client as server-sent events, and ends when the client leaves."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from functools import partial
from typing import Protocol

import anyio
import structlog
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from cllm_core.errors import CllmError

from ...generation.choices import ChoiceDelta, TokenCounts
from ...generation.generation import Generation
from ...http.errors import ErrorBody, error_body, internal_error_body
from ...http.record import RequestRecord
from ...settings import ServerSettings
from .logprobs import off_loop_if_many

# Streams end by themselves when the engine has drained; the library's own cut comes only after that failed.
_CUT_AFTER_DRAIN_SECONDS = 10.0


_log = structlog.stdlib.get_logger(__name__)


class Script(Protocol):
    """The events of one stream, encoded.

    Called in this order: opening, events of each delta, and one of closing, failure and cut.
    """

    def opening(self) -> Iterable[bytes]:
        """What is sent before anything is decoded."""
        ...

    def events(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """The events of a delta."""
        ...

    async def closing(self, counts: TokenCounts) -> Iterable[bytes]:
        """What is sent after the last delta."""
        ...

    async def failure(self, error: ErrorBody) -> bytes:
        """What tells that the stream ends early."""
        ...

    async def cut(self, counts: TokenCounts) -> None:
        """Called where the client left before the last delta; nothing can be sent any more."""
        ...


class GenerationStream(EventSourceResponse):
    """Streams a generation by its script; an error event ends it early."""

    def __init__(
        self, generation: Generation, script: Script, *, record: RequestRecord, settings: ServerSettings
    ) -> None:
        self._generation = generation
        self._script = script
        self._record = record
        super().__init__(
            self._events(),
            ping=settings.sse_ping_seconds,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            sep="\n",
            shutdown_event=anyio.Event(),
            shutdown_grace_period=settings.drain_seconds + _CUT_AFTER_DRAIN_SECONDS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the last event or until the client leaves, and close the generation in every case."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Not in the events' generator: one that was never begun would not run its cleanup.
            self._record.is_aborted = self._record.error is None and not self._generation.is_complete
            await self._generation.aclose()
            if self._record.is_aborted:
                with anyio.CancelScope(shield=True):
                    await self._script.cut(self._generation.counts)

    async def _events(self) -> AsyncGenerator[bytes]:
        try:
            if opening := b"".join(self._script.opening()):
                yield opening
            num_open = self._generation.num_choices
            async with aclosing(self._generation.deltas()) as deltas:
                async for delta in deltas:
                    events = await off_loop_if_many([delta], partial(self._encode, delta))
                    num_open -= delta.finish_reason is not None
                    if not num_open:  # in one piece with the last delta: each piece costs both sides about as much
                        events += b"".join(await self._script.closing(self._generation.counts))
                    if events:
                        yield events
        except Exception as error:  # the status line is sent: this event is the only way left to tell
            yield await self._script.failure(self._error(error))

    def _encode(self, delta: ChoiceDelta) -> bytes:
        return b"".join(self._script.events(delta))

    def _error(self, error: Exception) -> ErrorBody:
        if isinstance(error, CllmError):
            body = error_body(error, request_id=self._record.request_id)
        else:
            _log.exception("unhandled error in a stream", exc_info=error)
            body = internal_error_body(self._record.request_id)
        self._record.error = body.error.code
        return body
