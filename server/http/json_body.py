"""Strict JSON bodies: declared as JSON, valid, finite, within the server's limits; else it is the client's error.

FastAPI alone would accept NaN, let deep nesting exhaust the stack and answer several of these with a bare sentence.
"""

import json
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cllm_core.errors import InvalidRequest

from .body_limits import BodyLimits, check_containers
from .errors import ClientDisconnected, UnsupportedMediaType
from .record import record_of


class JsonRoute(APIRoute):
    """A route whose body is strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Parse the body before FastAPI looks at it."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            _require_json(request.headers.get("content-type"))
            _require_plain(request.headers.get("content-encoding"))
            body = await _read(request)
            check_containers(body)
            body_limits: BodyLimits = request.app.state.body_limits
            value = parse_json(body)
            body_limits.check(value)
            refuse_repeated_names(body)
            return await handle(_ParsedRequest(request, body, value))

        return handle_strictly


def parse_json(body: bytes) -> object:
    """The value of a JSON text; InvalidRequest where it is malformed, not finite or nested deeper than 200 levels."""
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from error


def refuse_repeated_names(body: bytes) -> None:
    """Raise InvalidRequest where an object of a JSON text, known to be valid, names a field twice.

    The fast parser keeps the last value: the others would be accepted and ignored.
    """

    def check(pairs: list[tuple[str, object]]) -> None:
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                raise InvalidRequest(f"{name}: given twice in one object; leave one of them out", param=name)
            names.add(name)

    json.loads(body, object_pairs_hook=check)


class _ParsedRequest(Request):
    """A request whose body was read and parsed already."""

    def __init__(self, request: Request, body: bytes, value: object) -> None:
        super().__init__(request.scope, request.receive)
        self._raw = body
        self._value = value

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> object:
        return self._value


async def _read(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect as error:
        record_of(request.scope).is_aborted = True
        raise ClientDisconnected("the client closed the connection before its request was complete") from error


def _require_json(content_type: str | None) -> None:
    header = Message()
    header["content-type"] = content_type or "application/octet-stream"
    if header.get_content_type() != "application/json":
        raise UnsupportedMediaType(f"content-type={content_type!r}: send the body as application/json")


def _require_plain(content_encoding: str | None) -> None:
    if content_encoding not in (None, "", "identity"):
        raise UnsupportedMediaType(f"content-encoding={content_encoding!r}: send the body uncompressed")
