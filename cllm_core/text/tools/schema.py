"""What the JSON schema of a function says of each parameter, for formats that write them one by one.

Such formats write strings as they are and all other values as JSON, so the schema has to tell which is which.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from cllm_core.errors import InvalidRequest

JsonType = Literal["string", "integer", "number", "boolean", "null", "array", "object"]
Types = frozenset[JsonType]
Schema = Mapping[str, object]

ALL_TYPES: Types = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"})
"""Keywords that allow and forbid nothing."""

_PYTHON_TYPES: Mapping[type, JsonType] = {
    str: "string",
    int: "integer",
    float: "number",
    list: "array",
    Mapping: "object",
}
_DEFINITIONS = ("$defs", "definitions")
_OF_OBJECTS = {"type", "properties", "required", "additionalProperties", "x-guidance", *_DEFINITIONS}
_MAX_DEPTH = 64  # schemas within each other


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter of a function.

    Attributes:
        schema: of its value, with the definitions that it refers to.
        types: of JSON values that the schema allows.
    """

    name: str
    schema: Schema
    is_required: bool
    types: Types

    @property
    def is_text(self) -> bool:
        """Whether every value is a string."""
        return self.types == {"string"}

    @property
    def may_be_text(self) -> bool:
        """Whether a value may be a string."""
        return "string" in self.types


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a function.

    Attributes:
        declared: in the order of the schema.
        other: stands for those that are not declared, None where there may be none.
    """

    declared: tuple[Parameter, ...]
    other: Parameter | None

    def find(self, name: str) -> Parameter:
        """The parameter of that name; one of any value where there is none."""
        known = next((parameter for parameter in self.declared if parameter.name == name), self.other)
        return known or Parameter(name=name, schema={}, is_required=False, types=ALL_TYPES)


def read_parameters(schema: Schema, *, is_strict: bool) -> Parameters:
    """The parameters of a function.

    Args:
        schema: of the object that holds the arguments, as `arguments_schema` completes it.

    Raises:
        InvalidRequest: the function is strict, and the schema says more of the object than can be enforced.
    """
    root = SchemaDocument(schema).resolve(schema)
    unknown = sorted(root.keys() - _OF_OBJECTS - ANNOTATIONS)
    if is_strict and unknown:
        raise not_enforceable(unknown[0])
    properties = root.get("properties")
    required = as_list(root.get("required"))
    other = root.get("additionalProperties", True)
    return Parameters(
        declared=tuple(
            _parameter(name, value, schema, is_required=name in required)
            for name, value in (properties.items() if isinstance(properties, Mapping) else ())
        ),
        other=None if other is False else _parameter("", other, schema, is_required=False),
    )


def _parameter(name: str, schema: object, root: Schema, *, is_required: bool) -> Parameter:
    own = schema if isinstance(schema, Mapping) else {}
    shared = {key: root[key] for key in _DEFINITIONS if key in root and key not in own}
    merged = {**own, **shared}
    return Parameter(name=name, schema=merged, is_required=is_required, types=SchemaDocument(merged).types(merged))


class SchemaDocument:
    """Follows the references within one schema. Takes time in proportion to its length, whatever refers to what."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._types_of: dict[str, Types] = {}  # by reference; of one that is being followed, none yet

    def target(self, reference: object) -> object:
        """What a `$ref` points to; the schema of any value where it points to nothing in the document."""
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return {}
        found: object = self._root
        for key in reference[2:].split("/"):
            if not isinstance(found, Mapping):
                return {}
            found = found.get(key.replace("~1", "/").replace("~0", "~"), {})
        return found

    def resolve(self, schema: Schema) -> Schema:
        """The schema that a chain of references ends in."""
        seen: set[object] = set()
        while "$ref" in schema and schema["$ref"] not in seen:
            seen.add(schema["$ref"])
            target = self.target(schema["$ref"])
            schema = target if isinstance(target, Mapping) else {}
        return schema

    def types(self, schema: object, depth: int = 0) -> Types:
        """Types of the JSON values that the schema may allow."""
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return frozenset() if schema is False else ALL_TYPES
        if isinstance(reference := schema.get("$ref"), str):
            return self._types_behind(reference, depth)
        types = _named(schema)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                types &= frozenset[JsonType]().union(*(self.types(one, depth + 1) for one in as_list(schema[key])))
        for part in as_list(schema.get("allOf")):
            types &= self.types(part, depth + 1)
        return types

    def _types_behind(self, reference: str, depth: int) -> Types:
        if reference not in self._types_of:
            self._types_of[reference] = frozenset()
            self._types_of[reference] = self.types(self.target(reference), depth + 1)
        return self._types_of[reference]


def _named(schema: Schema) -> Types:
    """Types that the schema names itself, by `type` or by values."""
    names = as_list(schema["type"]) or [schema["type"]] if "type" in schema else ALL_TYPES
    types: Types = frozenset(name for name in ALL_TYPES if name in names) or ALL_TYPES
    if "number" in types:
        types |= {"integer"}
    if "const" in schema:
        types &= {type_of(schema["const"])}
    if "enum" in schema:
        types &= {type_of(value) for value in as_list(schema["enum"])}
    return types


def type_of(value: object) -> JsonType:
    """Type of a JSON value."""
    if isinstance(value, bool):  # which Python counts among the integers
        return "boolean"
    found = (name for kind, name in _PYTHON_TYPES.items() if isinstance(value, kind))
    return next(found, "null")


def may_be_json(text: str, types: Types) -> bool:
    """Whether a text may be the beginning of JSON of one of these types, strings aside."""
    start = text.strip()
    if not start:
        return True
    words = {"null": ["null"], "boolean": ["true", "false"]}
    if any(word.startswith(start) for name in words if name in types for word in words[name]):
        return True
    if start[0] in "-0123456789":
        return bool(types & {"integer", "number"})
    return (start[0] == "{" and "object" in types) or (start[0] == "[" and "array" in types)


def as_list(value: object) -> list[object]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def not_enforceable(what: str) -> InvalidRequest:
    """The error for a strict function whose schema cannot be enforced whole."""
    return InvalidRequest(
        f"the schema's {what} cannot be enforced in this model's format of calls: leave it out, or strict"
    )
