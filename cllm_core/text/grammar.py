"""Grammars for outputs, written from what clients ask for: JSON schema, regex, choice, or a grammar of their own.

All are llguidance's Lark syntax, the form of SamplingParams.grammar. Writing one checks next to nothing: that takes a
tokenizer and is the work of `cllm_core.text.grammar_compiler`.
"""

import json
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
        return "%json " + json.dumps({**schema, "x-guidance": {**own_style, **style}}, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the schema is no JSON: {error}", param="grammar") from error


def json_grammar(schema: Mapping[str, object]) -> str:
    """Matches JSON of this schema, written on one line; errors as `json_rule`."""
    return f"start: {json_rule(schema)}"


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
        raise InvalidRequest(f"the regex is no valid Unicode: {error}", param="grammar") from error


def choice_grammar(choices: Sequence[str]) -> str:
    """Matches one of these texts; InvalidRequest where there are none, or one is empty."""
    if not choices or not all(choices):
        raise InvalidRequest("give at least one choice, none of them empty", param="grammar")
    return "start: " + " | ".join(map(json.dumps, choices))


def written_grammar(text: str) -> str:
    """Matches a grammar of the client's own: Lark, or the GBNF of llama.cpp, known by its `::=`."""
    try:
        return any_to_lark(text)
    except Exception as error:  # the converter raises no narrower type
        raise InvalidRequest(f"the grammar cannot be read as GBNF: {error}", param="grammar") from error
