"""What happens to every HTTP request before and after its route: id, log line, API key, body limit.

Plain ASGI: these must see streamed bytes pass and must not stand between a stream and its client's disconnect.
"""

import hmac
import re
import uuid
from typing import Protocol

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cllm_core.errors import RequestError

from .errors import (
    AdminKeyRequired,
    BodyTooLarge,
    InvalidApiKey,
    answer_error,
    internal_error_response,
    shortened,
)
from .ignored import (
    IGNORED_FIELDS_HEADER,
    IgnoredFields,
    IgnoredFieldsLog,
    UnknownFields,
    collect_ignored,
)
from .record import RequestRecord, attach_record, record_of

REQUEST_ID_HEADER = "X-Request-Id"
OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics", "/version"})

ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""Endpoints that change the server for everyone."""
PLAYGROUND_PREFIX = "/playground/"

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_CLIENT_LEFT_STATUS = 499

_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")
_MAX_LOGGED = 120  # characters of one value

_log = structlog.stdlib.get_logger(__name__)


class ObserveRequest(Protocol):
    """Takes note of a request that has its whole answer."""

    def __call__(self, *, endpoint: str, status: int, record: RequestRecord) -> None:
        """Called once for each."""
        ...


class TraceRequest(Protocol):
    """Makes a trace of a request that has its whole answer."""

    def __call__(self, scope: Scope, *, endpoint: str, status: int, record: RequestRecord) -> None:
        """Called once for each."""
        ...


class RequestContextMiddleware:
    """Names the request, catches what nobody else caught, and writes one access line and its metrics."""

    def __init__(
        self,
        app: ASGIApp,
        observe: ObserveRequest,
        unknown_fields: UnknownFields,
        trace: TraceRequest | None = None,
    ) -> None:
        self._app = app
        self._observe = observe
        self._trace = trace
        self._unknown_fields = unknown_fields
        self._ignored_log = IgnoredFieldsLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ignored = IgnoredFields(self._unknown_fields)
        record = RequestRecord(request_id=_request_id(Headers(scope=scope)), ignored=ignored)
        attach_record(scope, record)
        status = _StatusProbe(send, record)
        with structlog.contextvars.bound_contextvars(request_id=record.request_id), collect_ignored(ignored):
            try:
                await self._app(scope, receive, status.send)
            except Exception:
                _log.exception("unhandled error")
                if not status.started:
                    await internal_error_response(record.request_id)(scope, receive, status.send)
            finally:
                self._report(scope, record, status.code)

    def _report(self, scope: Scope, record: RequestRecord, status: int) -> None:
        status = _CLIENT_LEFT_STATUS if record.is_aborted else status
        endpoint = _endpoint(scope)
        self._observe(endpoint=endpoint, status=status, record=record)
        if self._trace is not None and endpoint not in OPEN_PATHS:
            self._trace(scope, endpoint=endpoint, status=status, record=record)
        self._ignored_log.report(record.ignored)
        # Probes and scrapes come every few seconds: they would drown the lines worth reading.
        write = _log.debug if endpoint in OPEN_PATHS else _log.info
        write(
            "request",
            method=scope["method"],
            # As it was sent, percent-encoded: a decoded line break would forge a log line.
            path=scope["raw_path"].decode("latin-1"),
            status=status,
            error=record.error,
            param=None if record.error_param is None else _printable(record.error_param),
            peer=scope["client"][0] if scope["client"] else None,
            user_agent=_printable(Headers(scope=scope).get("user-agent", "")),
            model=record.model,
            seconds=round(record.seconds, 4),
            prompt_tokens=record.num_prompt_tokens,
            cached_tokens=record.num_cached_tokens,
            completion_tokens=record.num_completion_tokens,
            tokens_per_forward=round(record.tokens_per_forward, 3),
        )


class TrailingSlashMiddleware:
    """Takes a path with slashes behind it for the path: clients join base URL and path in every way."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http" and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


class ApiKeyMiddleware:
    """Lets only requests through that carry a key; the operations endpoints stay open.

    Args:
        app: gets the requests.
        api_keys: of clients; empty: they need none.
        admin_keys: of administrators, who may do all that clients may; empty: clients may change what is served.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...], admin_keys: tuple[str, ...] = ()) -> None:
        self._app = app
        self._api_keys = tuple(key.encode() for key in api_keys)
        self._admin_keys = tuple(key.encode() for key in admin_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        error = self._refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
            return
        await answer_error(error, record_of(scope))(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> RequestError | None:
        """Why the request is refused, None where it is not."""
        needs_admin = bool(self._admin_keys) and path in ADMIN_PATHS
        if _is_open(path) or not (needs_admin or self._api_keys):
            return None
        forms = _sent_keys(headers)
        is_client, is_admin = _matches(self._api_keys, forms), _matches(self._admin_keys, forms)
        if is_admin or (is_client and not needs_admin):
            return None
        if is_client:
            return AdminKeyRequired(
                f"{path}: needs a key of an administrator (--admin-key), and this one is a client's"
            )
        return InvalidApiKey("a valid API key is required: send the header 'Authorization: Bearer <key>'")


class BodyLimitMiddleware:
    """Refuses request bodies over the limit, announced or not, before they fill the memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            response = answer_error(self._error(), record_of(scope))
            await response(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._error()
            return message

        return receive_within_limit

    def _error(self) -> BodyTooLarge:
        return BodyTooLarge(f"the request body is longer than the limit of {self._max_bytes} bytes: shorten it")


class _StatusProbe:
    """Passes ASGI messages on, adds headers of the request's record and remembers the status."""

    def __init__(self, send: Send, record: RequestRecord) -> None:
        self._send = send
        self._record = record
        self.started = False
        self.code = 500

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.code = message["status"]
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID_HEADER] = self._record.request_id
            if ignored := self._record.ignored.header:
                headers[IGNORED_FIELDS_HEADER] = ignored
        await self._send(message)


def _sent_keys(headers: Headers) -> tuple[bytes, ...]:
    """The key of a request, in the encodings that clients use for letters beyond ASCII; empty where there is none."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return ()
    sent = given.strip(" \t")  # read as Latin-1, but it may have been sent as UTF-8
    return sent.encode("latin-1"), sent.encode()


def _matches(keys: tuple[bytes, ...], forms: tuple[bytes, ...]) -> bool:
    # Every key is compared, in constant time: how long it takes tells nothing about any key.
    found = [hmac.compare_digest(key, form) for key in keys for form in forms]
    return any(found)


def _is_open(path: str) -> bool:
    """Whether a path needs no key: operations, and the page that asks for one."""
    return path in OPEN_PATHS or path == "/" or path.startswith(PLAYGROUND_PREFIX)


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _printable(text: str) -> str:
    """What a client sent, fit for a line of the log."""
    return shortened(_NOT_PRINTABLE.sub("?", text), _MAX_LOGGED)


def _endpoint(scope: Scope) -> str:
    """The route's own path: a label that strangers cannot multiply by asking for made-up paths."""
    route = scope.get("route")
    return "unmatched" if route is None else str(route.path)
