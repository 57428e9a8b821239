"""Every error as an OpenAI error object, and the one table that gives each error type its HTTP status.

RequestError (cllm_core.errors)
|-- ModelNotFound           the named model is not served here
|-- InvalidApiKey           no key, or a wrong one
|-- AdminKeyRequired        a client's key, where an administrator's is needed
|-- ResponseNotFound        the named response is not stored for this key
|-- PreviousResponseNotFound    nor is one that a request continues
|-- ItemNotFound            nor is one of the items that it refers to
|-- BodyTooLarge            the request body is over the limit
|-- HeadersTooLarge         so are the headers
|-- RequestTooSlow          headers or body took too long to arrive
|-- UnsupportedMediaType    the request body is not declared as JSON
CllmError
|-- TooManyConnections      no further one is taken
|-- StoreUnavailable        stored responses cannot be read or written
`-- ClientDisconnected      the client left before its request or its answer was complete
"""

import math
from dataclasses import dataclass
from http import HTTPStatus

import structlog
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match

from cllm_core.errors import (
    CllmError,
    EngineBusy,
    EngineFailed,
    EngineUnavailable,
    FirstTokenTimeout,
    InvalidRequest,
    PromptCrashedWorker,
    PromptTooLong,
    QueueTimeout,
    RequestError,
    RequestTimeout,
    UnsupportedParameter,
)

from .record import RequestRecord

UNAVAILABLE_RETRY_SECONDS = 2.0

# An error quotes what the client sent, which may be megabytes.
_MAX_MESSAGE = 1000
MAX_QUOTED = 80
"""Characters of one value in a message."""

_log = structlog.stdlib.get_logger(__name__)


class ModelNotFound(RequestError):
    """The named model is not served here."""


class InvalidApiKey(RequestError):
    """No API key, or a wrong one."""


class AdminKeyRequired(RequestError):
    """A client's key, where an administrator's is needed."""


class ResponseNotFound(RequestError):
    """The named response is not stored for this key."""


class PreviousResponseNotFound(RequestError):
    """A response that the request continues is not stored for this key."""


class ItemNotFound(RequestError):
    """An item that the request refers to is not stored for this key."""


class HeadersTooLarge(RequestError):
    """The request's headers are over the limit."""


class RequestTooSlow(RequestError):
    """The request's headers or its body took too long to arrive."""


class TooManyConnections(CllmError):
    """As many connections are open as there may be."""


class StoreUnavailable(CllmError):
    """Stored responses cannot be read or written."""


class BodyTooLarge(RequestError):
    """The request body is over the limit."""


class UnsupportedMediaType(RequestError):
    """The request body is not declared as JSON."""


class ClientDisconnected(CllmError):
    """The client left before its request or its answer was complete; nobody reads the response."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """How one error type looks over HTTP: the status, and `type` and `code` of the OpenAI error object."""

    status: int
    type: str
    code: str | None = None


INTERNAL_ERROR = HttpError(500, "server_error", "internal_error")

HTTP_ERRORS: dict[type[CllmError], HttpError] = {
    RequestError: HttpError(400, "invalid_request_error"),
    InvalidRequest: HttpError(400, "invalid_request_error", "invalid_value"),
    UnsupportedParameter: HttpError(400, "invalid_request_error", "unsupported_parameter"),
    PromptTooLong: HttpError(400, "invalid_request_error", "context_length_exceeded"),
    PromptCrashedWorker: HttpError(400, "invalid_request_error", "prompt_crashed_worker"),
    InvalidApiKey: HttpError(401, "authentication_error", "invalid_api_key"),
    AdminKeyRequired: HttpError(403, "permission_error", "admin_key_required"),
    ModelNotFound: HttpError(404, "invalid_request_error", "model_not_found"),
    ResponseNotFound: HttpError(404, "invalid_request_error", "not_found"),
    PreviousResponseNotFound: HttpError(400, "invalid_request_error", "previous_response_not_found"),
    ItemNotFound: HttpError(400, "invalid_request_error", "item_not_found"),
    StoreUnavailable: HttpError(503, "server_error", "store_unavailable"),
    BodyTooLarge: HttpError(413, "invalid_request_error", "request_too_large"),
    HeadersTooLarge: HttpError(431, "invalid_request_error", "headers_too_large"),
    RequestTooSlow: HttpError(408, "invalid_request_error", "request_too_slow"),
    TooManyConnections: HttpError(503, "server_error", "too_many_connections"),
    UnsupportedMediaType: HttpError(415, "invalid_request_error", "unsupported_media_type"),
    EngineBusy: HttpError(429, "rate_limit_error", "engine_busy"),
    ClientDisconnected: HttpError(499, "client_disconnected"),
    EngineUnavailable: HttpError(503, "server_error", "engine_unavailable"),
    EngineFailed: HttpError(503, "server_error", "engine_failed"),
    QueueTimeout: HttpError(503, "server_error", "queue_timeout"),
    FirstTokenTimeout: HttpError(504, "server_error", "ttft_timeout"),
    RequestTimeout: HttpError(504, "server_error", "request_timeout"),
    CllmError: INTERNAL_ERROR,
}

# Of OpenAI's endpoints.
_BASE = "/v1"

_METHODS = ("GET", "HEAD", "POST", "DELETE")

STATUS_CODES: dict[int, str] = {404: "unknown_url", 405: "method_not_allowed"}


class ErrorDetail(BaseModel):
    """The inner part of an OpenAI error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An OpenAI error object."""

    error: ErrorDetail


def http_error_of(error: CllmError) -> HttpError:
    """The table's row for the error's type, or for its nearest parent there."""
    return next(HTTP_ERRORS[kind] for kind in type(error).__mro__ if kind in HTTP_ERRORS)


def error_body(error: CllmError, *, request_id: str) -> ErrorBody:
    """What the client reads about the error; an internal one is logged instead, details and all."""
    row = http_error_of(error)
    if row is INTERNAL_ERROR:
        _log.error("internal error", request_id=request_id, exc_info=error)
        return internal_error_body(request_id)
    param = error.param if isinstance(error, RequestError) else None
    if param is not None:
        param = shortened(param, MAX_QUOTED)
    message = shortened(str(error), _MAX_MESSAGE)
    return ErrorBody(error=ErrorDetail(message=message, type=row.type, param=param, code=row.code))


def internal_error_body(request_id: str) -> ErrorBody:
    """The answer to a bug of this project: nothing but the id under which the log has the details."""
    message = f"The server had an internal error. Its log has the details under request id {request_id}."
    return ErrorBody(error=ErrorDetail(message=message, type=INTERNAL_ERROR.type, param=None, code=INTERNAL_ERROR.code))


def error_response(error: CllmError, *, request_id: str) -> JSONResponse:
    """The whole HTTP answer to an error, with Retry-After where trying again makes sense."""
    body = error_body(error, request_id=request_id)
    return JSONResponse(body.model_dump(), http_error_of(error).status, _extra_headers(error))


def answer_error(error: CllmError, record: RequestRecord) -> JSONResponse:
    """The answer to an error that a request ends in, which its record remembers."""
    row = http_error_of(error)
    record.error = row.code or row.type
    record.error_param = error.param if isinstance(error, RequestError) else None
    return error_response(error, request_id=record.request_id)


def internal_error_response(request_id: str) -> JSONResponse:
    """The HTTP answer to a bug of this project."""
    return JSONResponse(internal_error_body(request_id).model_dump(), INTERNAL_ERROR.status)


def http_exception_response(error: HTTPException, request: Request) -> JSONResponse:
    """The OpenAI form of what the router itself refuses: unknown paths and methods."""
    detail = ErrorDetail(
        message=_refused_route(error, request),
        type="invalid_request_error",
        param=None,
        code=STATUS_CODES.get(error.status_code),
    )
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = _allowed_methods(request)
    return JSONResponse(ErrorBody(error=detail).model_dump(), error.status_code, headers)


def _allowed_methods(request: Request) -> str:
    """Those of all routes at the path; the router names those of the first one."""
    with_methods = [{**request.scope, "method": method} for method in _METHODS]
    return ", ".join(
        scope["method"]
        for scope in with_methods
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    )


def _refused_route(error: HTTPException, request: Request) -> str:
    route = f"{request.method} {shortened(request.url.path, MAX_QUOTED)}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        return f"{route}: there is no such endpoint; {_remedy(request)}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return f"{route}: the endpoint does not take this method; use {_allowed_methods(request)}"
    return f"{route}: {error.detail}"


def _remedy(request: Request) -> str:
    """What the client most likely meant: base URLs are given with /v1 where it is missing, and without it where not."""
    path = request.url.path
    with_base = {**request.scope, "path": _BASE + path}
    if any(route.matches(with_base)[0] is not Match.NONE for route in request.app.routes):
        return f"the base URL must end in {_BASE}"
    if path.startswith(_BASE * 2):
        return f"the base URL ends in {_BASE} already; leave the second one out"
    return "/docs lists the endpoints"


def shortened(text: str, length: int) -> str:
    """The beginning of a text that is longer than that."""
    return text if len(text) <= length else f"{text[:length]}..."


def _extra_headers(error: CllmError) -> dict[str, str]:
    match error:
        case EngineBusy():
            return {"Retry-After": str(math.ceil(error.retry_after))}
        case EngineUnavailable() | EngineFailed() | QueueTimeout() | TooManyConnections():
            return {"Retry-After": str(math.ceil(UNAVAILABLE_RETRY_SECONDS))}
        case InvalidApiKey():
            return {"WWW-Authenticate": "Bearer"}
        case BodyTooLarge():
            return {"Connection": "close"}  # the rest of the body is not worth reading
        case _:
            return {}
