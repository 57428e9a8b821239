"""The OpenAPI document: what each endpoint answers, errors and event streams included.

Routes say which statuses they can answer; the wording comes from the table of errors.
"""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter

from .errors import HTTP_ERRORS, INTERNAL_ERROR, ErrorBody

Responses = dict[int | str, dict[str, Any]]
"""FastAPI's `responses` of a route."""

_RETRY_AFTER = {"Retry-After": {"description": "Seconds until a retry makes sense.", "schema": {"type": "integer"}}}
_HAVE_RETRY_AFTER = frozenset({429, 503})

_REF_TEMPLATE = "#/components/schemas/{model}"


class DocumentedApi(FastAPI):
    """An app whose OpenAPI document tells of errors and events as they are.

    Args:
        events: what streams send, registered among the document's schemas.
    """

    def __init__(self, *, events: Iterable[type[BaseModel]], **options: Any) -> None:
        super().__init__(generate_unique_id_function=_operation_id, **options)
        self._events = tuple(events)

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            schemas = document["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for operation in _operations(document):
                operation["responses"].pop("422", None)  # FastAPI's own answer to bad bodies, never given here
            for event in self._events:
                schema = TypeAdapter(event).json_schema(mode="serialization", ref_template=_REF_TEMPLATE)
                schemas |= schema.pop("$defs", {})
                schemas[event.__name__] = schema
        return super().openapi()


def errors(*statuses: int) -> Responses:
    """Error answers of these statuses, each with the codes of the table of errors."""
    return {status: _error(status) for status in sorted({*statuses, 401, INTERNAL_ERROR.status})}


def event_stream(*events: type[BaseModel], ends_with_done: bool) -> Responses:
    """The answer of a route that streams on request: the body of its response model, or these events.

    Args:
        events: bodies of the events' data.
        ends_with_done: whether the last event's data is the text [DONE].
    """
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [{"$ref": _REF_TEMPLATE.format(model=event.__name__)} for event in events]},
    }
    if ends_with_done:
        data = {"anyOf": [data, {"const": "[DONE]"}]}
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}
    return {
        200: {
            "description": "The whole answer, or with stream=true its events; the schema is that of one event.",
            "content": {"text/event-stream": {"schema": event}},
        }
    }


def _error(status: int) -> dict[str, Any]:
    codes = sorted({row.code for row in HTTP_ERRORS.values() if row.status == status and row.code is not None})
    headers = {"headers": _RETRY_AFTER} if status in _HAVE_RETRY_AFTER else {}
    return {"model": ErrorBody, "description": f"Error: {' or '.join(codes)}", **headers}


def _operation_id(route: APIRoute) -> str:
    """The route function's name: it does not change when a path does, and reads well in generated clients."""
    return route.name


def _operations(document: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (operation for path in document["paths"].values() for operation in path.values())


GENERATION_ERRORS = errors(400, 404, 413, 415, 429, 503)
"""Error answers of the endpoints that generate."""
