"""The gateway: an ASGI app in front of the replicas. It reads a request whole, since its content decides where it goes.

It answers itself where no replica can: where one dies before it sent anything, another one is asked; where it dies in
the middle of a stream, the stream ends with an error event.
"""

import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cllm_core.errors import CllmError, EngineFailed, EngineUnavailable

from ..http.errors import answer_error, error_body
from ..http.middleware import REQUEST_ID_HEADER, ApiKeyMiddleware, BodyLimitMiddleware
from ..http.record import RequestRecord, attach_record, record_of
from ..http.sse import encode_event
from ..settings import ServerSettings
from .affinity import Affinity, read_affinity
from .calls import HttpCall

_log = structlog.stdlib.get_logger(__name__)

_MAX_ATTEMPTS = 3

# What changes a replica must reach all of them.
_BROADCAST_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class ReplicaLost(CllmError):
    """The replica that had a request is gone."""


@dataclass(frozen=True, slots=True)
class ReplicaMetrics:
    """What one replica tells of itself."""

    replica: str
    text: str  # in Prometheus' format


class Replicas(Protocol):
    """The replicas as a gateway sees them."""

    def answer(self, call: HttpCall, affinity: Affinity) -> AsyncGenerator[list[Message]]:
        """The ASGI messages of one replica; a generator that is closed early is a client that left.

        Raises:
            EngineBusy: too many requests wait for a replica.
            EngineUnavailable: there is none.
            ReplicaLost: it died.
        """
        ...

    async def answer_everywhere(self, call: HttpCall) -> Sequence[list[Message]]:
        """All messages of each of the replicas. Raises as `answer`."""
        ...

    async def metrics(self) -> Sequence[ReplicaMetrics]:
        """Of all replicas. Raises as `answer`."""
        ...


def create_gateway(replicas: Replicas, settings: ServerSettings) -> ASGIApp:
    """A gateway that refuses what any replica would before it reads it."""
    app: ASGIApp = _Forwarding(replicas)
    app = BodyLimitMiddleware(app, max_bytes=settings.max_body_bytes)
    if settings.api_keys or settings.admin_keys:
        app = ApiKeyMiddleware(app, api_keys=settings.api_keys, admin_keys=settings.admin_keys)
    return _Outermost(app)


class _Outermost:
    """Names the request, for all who handle it, and turns errors into answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            return
        scope = {**scope, "headers": list(scope["headers"]), "state": {}}
        headers = MutableHeaders(scope=scope)
        headers.setdefault(REQUEST_ID_HEADER, uuid.uuid4().hex)
        record = RequestRecord(request_id=headers[REQUEST_ID_HEADER])
        attach_record(scope, record)
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer.send)
        except CllmError as error:
            _log.warning("request failed", request_id=record.request_id, error=str(error))
            if not answer.has_begun:
                await answer_error(error, record)(scope, receive, send)
            elif answer.is_stream:
                event = encode_event(error_body(error, request_id=record.request_id).model_dump_json().encode())
                await send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                raise


class _Answer:
    """Passes ASGI messages on and remembers what they began."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = self.is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
        await self._send(message)


class _Forwarding:
    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["path"] == "/metrics":
            await self._send_metrics(scope, receive, send)
            return
        body = await _read_body(receive)
        if body is None:
            return
        call = HttpCall.of(scope, body)
        if scope["path"] in _BROADCAST_PATHS:
            await self._send_worst(call, send)
            return
        affinity = read_affinity(body) if scope["method"] == "POST" else Affinity()
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            has_begun = False
            try:
                async with aclosing(self._replicas.answer(call, affinity)) as answer:
                    async for messages in answer:
                        for message in messages:
                            has_begun = True
                            await send(message)
                return
            except ReplicaLost:
                if has_begun:
                    raise EngineFailed("the replica that answered was lost; ask again") from None
                _log.warning("replica lost", request_id=record_of(scope).request_id, attempt=attempt)
        raise EngineUnavailable(f"{_MAX_ATTEMPTS} replicas in turn were lost with this request; ask again later")

    async def _send_worst(self, call: HttpCall, send: Send) -> None:
        """One answer for all replicas: a failure, if there is one."""
        answers = await self._replicas.answer_everywhere(call)
        for message in max(answers, key=lambda messages: int(messages[0]["status"])):
            await send(message)

    async def _send_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Merged(await self._replicas.metrics()))
        await Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)(scope, receive, send)


class _Merged(Collector):
    """The series of all replicas, each with the label `replica`."""

    def __init__(self, parts: Iterable[ReplicaMetrics]) -> None:
        self._parts = parts

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        merged: dict[str, Metric] = {}
        for part in self._parts:
            for family in text_string_to_metric_families(part.text):
                of_all = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {**sample.labels, "replica": part.replica}
                    of_all.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)
        return merged.values()


async def _read_body(receive: Receive) -> bytes | None:
    """None where the client left."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
