"""What all request bodies share: strict parsing, and the fields that may only have values that ask for nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from cllm_core.errors import UnsupportedParameter
from cllm_core.request import BOUNDS, Bounds

EXAMPLE_MODEL = "cllm-chat"
"""Model of the examples in the OpenAPI document: the embedded one."""

# Sums and products of longer numbers have more digits than Python writes into a message.
MAX_COUNT = 2**31
"""Highest number of tokens or outputs that a field may ask for; the server's own limits are lower."""

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


@dataclass(frozen=True, slots=True)
class IsNeutral:
    """Tells whether a value of a field asks for nothing; `schema` says the same as a JSON schema."""

    accepts: Callable[[object], bool]
    schema: JsonSchemaValue

    def __call__(self, value: object) -> bool:
        """Whether it does."""
        return self.accepts(value)


def only(*values: object) -> IsNeutral:
    """Accept exactly these values: the documented defaults, which ask for nothing."""
    # Compared with the type, for 1 == True would let a number through where a switch is meant.
    return IsNeutral(
        lambda value: any(type(value) is type(accepted) and value == accepted for accepted in values),
        {"enum": list(values)} if values else {"type": "null"},
    )


# Documented to label the request and to change nothing.
metadata_text = IsNeutral(lambda value: isinstance(value, str), {"type": "string"})
metadata_map = IsNeutral(
    lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    {"type": "object", "additionalProperties": {"type": "string"}},
)

# What the official client's parsing helpers put into an answer for their user, and send back with it.
client_side = IsNeutral(lambda _: True, {})


class ApiModel(BaseModel):
    """A body or part of one: unknown fields and wrong types are refused, never converted or dropped.

    Attributes:
        refusable: known fields that are no fields of the model, for they may only have values that ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())

    refusable: ClassVar[Mapping[str, IsNeutral]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Publish what validators check beyond the types: fields of `refusable`, bounds of sampling parameters."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name, is_neutral in cls.refusable.items():
            properties[name] = {"anyOf": [is_neutral.schema, {"type": "null"}]}
        for name in properties.keys() & BOUNDS.keys():
            _publish_bounds(properties[name], BOUNDS[name])
        return schema


def _publish_bounds(field: JsonSchemaValue, bounds: Bounds) -> None:
    for form in field.get("anyOf", ()):
        if form.get("type") in ("number", "integer"):
            form.setdefault("exclusiveMinimum" if bounds.above_low else "minimum", bounds.low)
            form.setdefault("maximum", bounds.high)


# Fields of OpenAI's API that need no work here, for the values under which they change nothing.
LABEL_FIELDS: Mapping[str, IsNeutral] = {
    "user": metadata_text,
    "safety_identifier": metadata_text,
    "prompt_cache_key": metadata_text,
    "metadata": metadata_map,
    "store": only(False),
    "service_tier": only("auto", "default"),
}


def without_neutral(body: object, refusable: Mapping[str, IsNeutral], *, prefix: str = "") -> object:
    """The body without the known fields that ask for nothing; UnsupportedParameter where one asks for something.

    Args:
        prefix: of the fields' names in the error: the place of `body` in the request.
    """
    if not isinstance(body, dict):
        return body
    for name, is_neutral in refusable.items():
        if body.get(name) is not None and not is_neutral(body[name]):
            field = prefix + name
            raise UnsupportedParameter(f"{field}: this server does not support the value given", param=field)
    return {name: value for name, value in body.items() if name not in refusable}
