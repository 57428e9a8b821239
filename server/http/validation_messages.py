"""What pydantic finds wrong with a value, in plain English: what the value must be."""

from collections.abc import Mapping, Sequence

from pydantic_core import ErrorDetails

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


def plain_reasons(errors: Sequence[ErrorDetails]) -> str:
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
