"""Grammars for outputs, written from what clients ask for: JSON schema, regex, choice, or a grammar of their own.

All are llguidance's Lark syntax, the form of SamplingParams.grammar. Writing one checks next to nothing: that takes a
tokenizer and is the work of `cllm_core.text.grammar_compiler`.
"""

import json
import re
from collections.abc import Mapping, Sequence

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from cllm_core.errors import InvalidRequest

# One line, as Python's json.dumps writes it. Free white space would leave no token forced, and invites small models to
# write it without end.
_JSON_STYLE: Mapping[str, object] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}

_LOOK_AROUND = re.compile(r"\(\?<?[=!]")
# Keywords that hold values, not schemas.
_VALUES = frozenset({"const", "enum", "default", "examples"})


def json_rule(schema: Mapping[str, object]) -> str:
    """Right side of a Lark rule that matches JSON of this schema, to be put into larger grammars.

    Args:
        schema: JSON schema; its key "x-guidance" may hold llguidance's options, such as {"whitespace_flexible": true}.

    Raises:
        InvalidRequest: the schema cannot be written as JSON (or is too deep for it), or its "x-guidance" is no object.
    """
    style = schema.get("x-guidance", {})
    if not isinstance(style, Mapping):
        raise InvalidRequest("the schema's \"x-guidance\" must be an object of llguidance's options", param="grammar")
    try:
        # Separators that end in a space of their own would forbid other white space behind them.
        own_style = {} if style.get("whitespace_flexible") else _JSON_STYLE
        if style.get("lenient"):
            schema = _without_patterns(schema)
        return "%json " + json.dumps({**schema, "x-guidance": {**own_style, **style}}, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the schema cannot be written as JSON: {error}", param="grammar") from error


def json_grammar(schema: Mapping[str, object], *, is_strict: bool = True) -> str:
    """Matches JSON of this schema, written on one line; errors as `json_rule`.

    Args:
        is_strict: refuse a schema that cannot be enforced whole (by whoever compiles it); else what cannot be is left
            out.
    """
    return f"start: {json_rule(schema if is_strict else _lenient(schema))}"


def _lenient(schema: Mapping[str, object]) -> dict[str, object]:
    """The schema with llguidance's lenient mode on, in which it leaves out what it cannot enforce."""
    options = schema.get("x-guidance", {})
    return {**schema, "x-guidance": {"lenient": True, **options} if isinstance(options, Mapping) else options}


def has_look_around(schema: Mapping[str, object]) -> bool:
    """Whether a pattern of the schema looks ahead or behind, as that of pydantic's Decimal does."""
    return _without_patterns(schema) != schema


def _without_patterns(schema: Mapping[str, object]) -> dict[str, object]:
    try:
        return {name: _kept(name, value) for name, value in schema.items() if not _looks_around(name, value)}
    except RecursionError as error:
        raise InvalidRequest("the schema is nested too deeply", param="grammar") from error


def _kept(name: str, value: object) -> object:
    """A value of a schema without what it holds of such patterns."""
    if name in _VALUES:
        return value
    if isinstance(value, Mapping):
        return {inner: _kept(inner, item) for inner, item in value.items() if not _looks_around(inner, item)}
    return [_kept("", item) for item in value] if isinstance(value, list) else value


def _looks_around(name: str, value: object) -> bool:
    return name == "pattern" and isinstance(value, str) and _LOOK_AROUND.search(value) is not None


def json_object_grammar() -> str:
    """Matches any JSON object, written on one line."""
    return json_grammar({"type": "object"})


def regex_grammar(pattern: str) -> str:
    """Matches what the regex matches as a whole (syntax of the Rust crate `regex`, without look-around).

    Raises:
        InvalidRequest: the pattern holds half of a surrogate pair, which no UTF-8 text can.
    """
    try:
        return f"start: /{regex_to_lark(pattern, '')}/"
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the regex is not valid Unicode: {error}", param="grammar") from error


def choice_grammar(choices: Sequence[str]) -> str:
    """Matches one of these texts; InvalidRequest where there are none, or one is empty."""
    if not choices or not all(choices):
        raise InvalidRequest("at least one choice is needed, none of them empty", param="grammar")
    return "start: " + " | ".join(map(json.dumps, choices))


def written_grammar(text: str) -> str:
    """Matches a grammar of the client's own: Lark, or the GBNF of llama.cpp, known by its `::=`."""
    try:
        return any_to_lark(text)
    except Exception as error:  # the converter raises no narrower type
        raise InvalidRequest(f"the grammar cannot be read as GBNF: {error}", param="grammar") from error
