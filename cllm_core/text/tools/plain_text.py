"""Regexes of strings that are written as they are, without quotes, from the JSON schemas of the values."""

import re
from collections.abc import Iterator, Mapping

from cllm_core.text.lark import ANY_TEXT, escape
from cllm_core.text.tools.schema import (
    ANNOTATIONS,
    JsonType,
    Parameter,
    Schema,
    SchemaDocument,
    as_list,
    not_enforceable,
)

_MAX_DEPTH = 64  # schemas within each other
_LOOK_AROUND = re.compile(r"\(\?<?[=!]")
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS: Mapping[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"({_OCTET}\.){{3}}{_OCTET}",
    "email": r"[A-Za-z0-9.!#$%&'*+=?^_`{|}~-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*",
}
_SCALARS: Mapping[JsonType, str] = {
    "null": "null",
    "boolean": "(true|false)",
    "integer": "-?(0|[1-9][0-9]*)",
    "number": r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?",
}


def text_pattern(parameter: Parameter, *, is_strict: bool) -> str:
    """Regex of a parameter's values where they may be strings; values of other types stand there as JSON.

    Raises:
        InvalidRequest: the function is strict, and the schema demands what no regex here expresses.
    """
    alternatives = list(_Reader(parameter.schema, is_strict=is_strict).strings(parameter.schema))
    if ANY_TEXT in alternatives:
        return ANY_TEXT
    alternatives += [pattern for name, pattern in _SCALARS.items() if name in parameter.types]
    return "|".join(f"({pattern})" for pattern in alternatives)


class _Reader:
    """Reads the schema of one parameter, each definition once."""

    def __init__(self, root: Schema, *, is_strict: bool) -> None:
        self._document = SchemaDocument(root)
        self._is_strict = is_strict
        self._followed: set[object] = set()

    def strings(self, schema: object, depth: int = 0) -> Iterator[str]:
        """Regexes of the strings that the schema allows."""
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            yield ANY_TEXT
        elif "$ref" in schema:
            if schema["$ref"] not in self._followed:
                self._followed.add(schema["$ref"])
                yield from self.strings(self._document.target(schema["$ref"]), depth + 1)
        elif branches := _branches(schema):
            for branch in branches:
                yield from self.strings(branch, depth + 1)
        else:
            self._check(schema)
            if "string" in self._document.types(schema):
                yield self._one(schema)

    def _check(self, schema: Schema) -> None:
        """Refuse, of a strict function, what would not be enforced beside strings."""
        bounds = sorted(_BOUNDS & schema.keys())
        is_structured = self._document.types(schema) & {"array", "object"} and schema.keys() - ANNOTATIONS - {"type"}
        if self._is_strict and (bounds or is_structured or "allOf" in schema):
            raise not_enforceable(bounds[0] if bounds else "mixture of strings and other values")

    def _one(self, schema: Schema) -> str:
        if values := ([schema["const"]] if "const" in schema else as_list(schema.get("enum"))):
            return "|".join(escape(value) for value in values if isinstance(value, str))
        constraints = [*self._patterns(schema), *self._formats(schema), *_lengths(schema)]
        if len(constraints) > 1 and self._is_strict:
            raise not_enforceable("combination of pattern, format and length")
        return constraints[0] if constraints else ANY_TEXT

    def _patterns(self, schema: Schema) -> Iterator[str]:
        pattern = schema.get("pattern")
        if not isinstance(pattern, str):
            return
        if not _LOOK_AROUND.search(pattern):
            yield _whole(pattern)
        elif self._is_strict:
            raise not_enforceable(f"pattern {pattern!r}")

    def _formats(self, schema: Schema) -> Iterator[str]:
        name = schema.get("format")
        if not isinstance(name, str):
            return
        if name in _FORMATS:
            yield _FORMATS[name]
        elif self._is_strict:
            raise not_enforceable(f"format {name!r}")


def _branches(schema: Schema) -> list[object]:
    """The schemas of which a value matches one; a list of one that all have to match is the same."""
    options = [option for key in ("anyOf", "oneOf") for option in as_list(schema.get(key))]
    parts = as_list(schema.get("allOf"))
    return options or (parts if len(parts) == 1 else [])


def _lengths(schema: Schema) -> Iterator[str]:
    low, high = schema.get("minLength"), schema.get("maxLength")
    if low is not None or high is not None:
        yield f"(?s:.{{{low or 0},{'' if high is None else high}}})"


def _whole(pattern: str) -> str:
    """The regex of whole texts of which some part matches the pattern, as JSON schemas mean it."""
    return "|".join(map(_whole_alternative, _alternatives(pattern)))


def _whole_alternative(pattern: str) -> str:
    is_ended = pattern.endswith("$") and not pattern.endswith(r"\$")
    head = "" if pattern.startswith("^") else ANY_TEXT
    tail = "" if is_ended else ANY_TEXT
    return f"{head}({pattern.removeprefix('^')[: -1 if is_ended else None]}){tail}"


def _alternatives(pattern: str) -> list[str]:
    """The parts between the bars outside of groups and classes: each has anchors of its own."""
    parts: list[list[str]] = [[]]
    depth, in_class, is_escaped = 0, False, False
    for char in pattern:
        if is_escaped:
            is_escaped = False
        elif char == "\\":
            is_escaped = True
        elif in_class:
            in_class = char != "]"
        elif char == "|" and depth == 0:
            parts.append([])
            continue
        else:
            in_class = char == "["
            depth += (char == "(") - (char == ")")
        parts[-1].append(char)
    return ["".join(part) for part in parts]
