"""What pydantic finds wrong with a body, as an error that names the field and says in plain English what it must be."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails

from cllm_core.errors import (
    InvalidRequest,
    RequestError,
)

from .errors import MAX_QUOTED, shortened
from .ignored import IgnoredFieldRefused

_MUST_BE = "must be "

# By pydantic's type of error; names in braces are its details.
_REASONS: Mapping[str, str] = {
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "none_required": "must be null",
    "literal_error": "must be {expected}",
    "union_tag_not_found": "must be an object with a {discriminator}",
    "union_tag_invalid": "{discriminator} must be one of {expected_tags}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}


def request_error_of(error: RequestValidationError) -> RequestError:
    """The first thing pydantic found wrong, as an error that names the field.

    A RequestError raised inside a validator comes through as it is; one that names no field gets its own.
    """
    first, *rest = error.errors()
    param = _param(first, error.body)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, IgnoredFieldRefused):
        return cause.at(param or "")
    if isinstance(cause, RequestError):
        cause.param = cause.param or param
        return cause
    if first["type"] == "missing":
        return InvalidRequest(f"{param or 'the request body'}: required, but missing; add it", param=param)
    same_field = [first, *(other for other in rest if _param(other, error.body) == param)]
    value = shortened(repr(first.get("input")), MAX_QUOTED)
    return InvalidRequest(f"{param or 'body'}={value}: {_plain_reasons(same_field)}", param=param)


def _param(error: ErrorDetails, body: Any) -> str | None:
    is_missing = error["type"] == "missing"
    return shortened(_field(error["loc"], body, is_missing=is_missing), MAX_QUOTED) or None


def _field(place: Sequence[str | int], body: Any, *, is_missing: bool) -> str:
    """The path of a field in the body, without what pydantic adds to it: which form of a value it tried.

    Args:
        place: pydantic's path, from "body", "query" or "path" on.
        is_missing: the last part of the path is a field that is not there.
    """
    if place[0] != "body":
        return ".".join(map(str, place[1:]))
    parts: list[str] = []
    value = body
    for num_seen, part in enumerate(place[1:], start=2):
        if _holds(value, part):
            value = value[part]
        elif not (is_missing and num_seen == len(place)):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _holds(value: object, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _plain_reasons(errors: Sequence[ErrorDetails]) -> str:
    """What the value of a field must be, which may have one of several forms."""
    reasons = list(dict.fromkeys(map(_reason, errors)))
    if all(reason.startswith(_MUST_BE) for reason in reasons):
        return _MUST_BE + " or ".join(reason.removeprefix(_MUST_BE) for reason in reasons)
    return ", or ".join(reasons)


def _reason(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] == "value_error":
        return str(context["error"])
    template = _REASONS.get(error["type"])
    return template.format(**context) if template is not None else error["msg"].replace("Input should", "must")
