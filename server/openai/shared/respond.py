"""How a generation reaches its client, as one JSON body or as server-sent events, and ends when the client leaves."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import anyio
import structlog
from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cllm_core.errors import CllmError
from server.generation.generation import ChoiceDelta, ChoiceResult, Generation, GenerationPlan, TokenCounts
from server.generation.served_models import LoadedModel
from server.http.errors import ClientDisconnected, ErrorBody, error_body, internal_error_body
from server.http.record import RequestRecord, record_of
from server.openai.shared.answers import Answer
from server.openai.shared.text_frames import as_json
from server.services import Services
from server.settings import ServerSettings

T = TypeVar("T")

# Streams end by themselves when the engine has drained; the library's own cut comes only after that failed.
_CUT_AFTER_DRAIN_SECONDS = 10.0

_log = structlog.stdlib.get_logger(__name__)


async def start_generation(
    request: Request, services: Services, plan: GenerationPlan, model: LoadedModel
) -> Generation:
    """Begin to decode what the plan asks for; whoever calls must close the generation, which responding does."""
    record = record_of(request.scope)
    record.model = model.adapter_name or services.models.name_or_empty
    generation = Generation(services.engine, model.codec, plan, record=record, metrics=services.metrics)
    await generation.start()
    return generation


class Script(Protocol):
    """The events of one stream, encoded. Called in this order: opening, events of each delta, closing; or failure."""

    def opening(self) -> Iterable[bytes]:
        """What is sent before anything is decoded."""
        ...

    def events(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """What tells of a delta."""
        ...

    def closing(self, counts: TokenCounts) -> Iterable[bytes]:
        """What is sent after the last delta."""
        ...

    def failure(self, error: ErrorBody) -> bytes:
        """What tells that the stream ends early."""
        ...


class ChunkScript:
    """A chunk for each delta, then the usage where asked for, then [DONE]."""

    def __init__(self, answer: Answer, *, usage: bool) -> None:
        self._answer = answer
        self._usage = usage

    def opening(self) -> Iterable[bytes]:
        """Nothing: the first chunk opens the stream."""
        return ()

    def events(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """The chunks, unless there is nothing to say."""
        return map(sent, self._answer.chunks(delta)) if delta.says_something else ()

    def closing(self, counts: TokenCounts) -> Iterable[bytes]:
        """The usage, and the end mark."""
        usage = (sent(self._answer.usage_chunk(counts)),) if self._usage else ()
        return (*usage, sent(b"[DONE]"))

    def failure(self, error: ErrorBody) -> bytes:
        """The error object."""
        return sent(as_json(error))


async def respond_whole(
    request: Request, generation: Generation, shape: Callable[[Sequence[ChoiceResult], TokenCounts], BaseModel]
) -> Response:
    """Wait for every choice and answer in one body; closes the generation, at once when the client leaves.

    Raises:
        ClientDisconnected: nobody waits for the answer any more.
        EngineFailed, EngineUnavailable: as Generation.deltas.
    """
    try:
        results = await _until_disconnect(request, generation.results())
    except ClientDisconnected:
        record_of(request.scope).is_aborted = True
        raise
    finally:
        await generation.aclose()
    body = shape(results, generation.counts)
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")


class GenerationStream(EventSourceResponse):
    """Streams a generation as its script tells it; an error event ends it early."""

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

    async def _events(self) -> AsyncGenerator[bytes]:
        try:
            if opening := b"".join(self._script.opening()):
                yield opening
            num_open = self._generation.num_choices
            async with aclosing(self._generation.deltas()) as deltas:
                async for delta in deltas:
                    events = b"".join(self._script.events(delta))
                    num_open -= delta.finish_reason is not None
                    if not num_open:  # in one piece with the last delta: each piece costs both sides about as much
                        events += b"".join(self._script.closing(self._generation.counts))
                    if events:
                        yield events
        except Exception as error:  # the status line is sent: this event is the only way left to tell
            yield self._script.failure(self._error(error))

    def _error(self, error: Exception) -> ErrorBody:
        if isinstance(error, CllmError):
            body = error_body(error, request_id=self._record.request_id)
        else:
            _log.exception("unhandled error in a stream", exc_info=error)
            body = internal_error_body(self._record.request_id)
        self._record.error = body.error.code
        return body


def sent(data: bytes, *, name: str | None = None) -> bytes:
    """A server-sent event; its data, such as JSON, holds no line breaks."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + data + b"\n\n"


async def _until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless the client leaves first: then `work` is cancelled (ClientDisconnected)."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnected("the client closed the connection before its answer was complete")
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
