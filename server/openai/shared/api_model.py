"""What all request bodies share: types are checked, null and empty count as left out, unknown fields are reported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from cllm_core.errors import UnsupportedParameter
from cllm_core.request import BOUNDS, MAX_LOGPROBS, Bounds

from ...http.ignored import ignore_field

EXAMPLE_MODEL = "cllm-chat"
"""Model of the examples in the OpenAPI document: the embedded one."""

# Sums and products of longer numbers have more digits than Python writes into a message.
MAX_COUNT = 2**31
"""Highest number of tokens or outputs that a field may ask for; the server's own limits are lower."""


def _whole(value: object) -> object:
    """8.0 as 8: languages with one type of number write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Bounds stand before the validator, else the OpenAPI document loses them.
Integer = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT), BeforeValidator(_whole)]
Priority = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT), BeforeValidator(_whole)]
TopK = Annotated[int, Field(ge=-1), BeforeValidator(_whole)]
"""-1 keeps all tokens, as 0 does."""
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_whole)]


@dataclass(frozen=True, slots=True)
class Neutral:
    """Values of a field that ask for nothing; `schema` says the same as a JSON schema."""

    accepts: Callable[[object], bool]
    schema: JsonSchemaValue


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that would change the answer if it were honoured, so that other values than the neutral are refused.

    Attributes:
        reason: what the server cannot do.
    """

    reason: str
    neutral: Neutral


def only(*values: object) -> Neutral:
    """Exactly these values: the documented defaults, which ask for nothing."""
    # Compared with the type, for 1 == True would let a number through where a switch is meant.
    return Neutral(
        lambda value: any(type(value) is type(accepted) and value == accepted for accepted in values),
        {"enum": list(values)} if values else {"type": "null"},
    )


ANY_VALUE = Neutral(lambda _: True, {})
"""For fields that label a request, or that clients add to an answer for their user and send back with it."""

REQUEST_LABELS: Mapping[str, Neutral] = {
    "prompt_cache_key": ANY_VALUE,
    "prompt_cache_retention": ANY_VALUE,
    "prompt_cache_options": ANY_VALUE,
    "metadata": ANY_VALUE,
}
"""Fields of OpenAI's API that are documented to change nothing in the answer."""

SERVICE_FIELDS: Mapping[str, Neutral] = {"store": only(False), "service_tier": only("auto", "default")}
"""Fields about what OpenAI's service does beside answering."""


class ApiModel(BaseModel):
    """A body or part of one.

    Wrong types are refused, never converted, but for whole numbers written as 8.0. A field that is null or empty counts
    as left out. Fields that no model knows are ignored and reported.

    Attributes:
        path_prefix: path of the model in a request, with a dot behind it, for the names of ignored fields.
        without_effect: known fields that change no answer here, whatever they say. Reported, unless the value asks for
            nothing anyway.
        refused: known fields that would change it.
        keeps_empty: fields whose empty value is a value.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())

    path_prefix: ClassVar[str] = ""
    without_effect: ClassVar[Mapping[str, Neutral]] = {}
    refused: ClassVar[Mapping[str, Refused]] = {}
    keeps_empty: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _keep_own_fields(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        required = _own_fields(cls)
        kept: dict[str, object] = {}
        for name, value in body.items():
            if name in required:
                if required[name] or name in cls.keeps_empty or not is_empty(value):
                    kept[name] = value
            elif not is_empty(value):
                cls._drop(name, value)
        return kept

    @classmethod
    def _drop(cls, name: str, value: object) -> None:
        refused = cls.refused.get(name)
        if refused is not None and not refused.neutral.accepts(value):
            raise UnsupportedParameter(
                f"{cls.path_prefix}{name}: {refused.reason}; leave it out", param=None if cls.path_prefix else name
            )
        neutral = cls.without_effect.get(name)
        if refused is None and not (neutral is not None and neutral.accepts(value)):
            reason = "this server does not know the field" if neutral is None else "the value has no effect here"
            ignore_field(name, prefix=cls.path_prefix, is_known=neutral is not None, reason=reason)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Publish what validators check beyond the types: fields that are not the model's own, bounds of sampling."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name, is_required in _own_fields(cls).items():
            if not is_required and name not in cls.keeps_empty:
                properties[name] = _or_left_out(properties[name])
        for name, refused in cls.refused.items():
            properties[name] = {"anyOf": [refused.neutral.schema, _LEFT_OUT]}
        for name in cls.without_effect:
            properties[name] = {}
        for name in properties.keys() & BOUNDS.keys() - {"max_tokens"}:  # which is cut where it is too high
            _publish_bounds(properties[name], BOUNDS[name])
        return schema


@cache
def _own_fields(model: type[ApiModel]) -> Mapping[str, bool]:
    """The names by which a body gives the model's fields, and whether each is required."""
    return {info.alias or name: info.is_required() for name, info in model.model_fields.items()}


def is_empty(value: object) -> bool:
    """Whether a field with this value counts as left out."""
    return value is None or (isinstance(value, str | list | dict) and not value)


# As a JSON schema: what is_empty accepts.
_LEFT_OUT: JsonSchemaValue = {"enum": [None, "", [], {}]}


def _or_left_out(field: JsonSchemaValue) -> JsonSchemaValue:
    """The schema of a field that may be empty too."""
    forms = field.pop("anyOf", None)
    if forms is None:
        about: JsonSchemaValue = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
        return {**about, "anyOf": [field, _LEFT_OUT]}
    return {**field, "anyOf": [*(form for form in forms if form != {"type": "null"}), _LEFT_OUT]}


def _publish_bounds(field: JsonSchemaValue, bounds: Bounds) -> None:
    for form in field.get("anyOf", ()):
        if form.get("type") in ("number", "integer"):
            form.setdefault("exclusiveMinimum" if bounds.above_low else "minimum", bounds.low)
            form.setdefault("maximum", bounds.high)
