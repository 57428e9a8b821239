"""The grammar of an output that may or must call functions: what a model writes behind a marker is a valid call.

Written in the Lark dialect of the llguidance library, where `<[id]>` is a token, `%json` a JSON schema and a rule that
is `[lazy]` ends with the first match. Fixed strings leave the model no choice, so most of a call needs no guessing.
"""

import re
from collections.abc import Iterator, Mapping

import msgspec

from cllm_core.errors import InvalidRequest
from cllm_core.text.grammar import json_rule
from cllm_core.text.tools.formats import WHITE_SPACE, Function, ToolFormat, to_json

_ANY_TEXT = "(?s:.*)"
_SOME_TEXT = "(?s:.+)"


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """What a grammar has to know of the tokenizer.

    Attributes:
        marks: text -> id of the strings in the tool format that are tokens of their own.
        visible_ids: other tokens added to the vocabulary that are part of the text (<think>, ...).
    """

    marks: Mapping[str, int] = {}
    visible_ids: tuple[int, ...] = ()


class CallRules(msgspec.Struct, frozen=True, kw_only=True):
    """Which calls an output may hold.

    Attributes:
        functions: that may be called, at least one, with different names.
        is_required: the output is calls, else it may be text, or text with calls behind it.
        is_parallel: more than one call may be made.
        content: grammar that text has to match where it takes the place of calls; None leaves text free.
    """

    functions: tuple[Function, ...]
    is_required: bool
    is_parallel: bool
    content: str | None = None


def calls_grammar(tool_format: ToolFormat, rules: CallRules, vocabulary: Vocabulary) -> str:
    """The grammar, for SamplingParams.grammar.

    Raises:
        InvalidRequest: the format cannot be told from text that has to match a grammar.
    """
    return "\n".join(_Writer(tool_format, rules, vocabulary).lines())


def arguments_schema(function: Function) -> dict[str, object]:
    """JSON schema of a call's arguments: an object, of the parameters that the function declares and no others."""
    declared = function.parameters
    schema: dict[str, object] = {"properties": {}} if declared is None else dict(declared)
    schema["type"] = "object"
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    # What the library cannot enforce is refused where the client is strict about it, else left to the model.
    return schema | {"x-guidance": {"lenient": not function.is_strict}}


class _Writer:
    def __init__(self, tool_format: ToolFormat, rules: CallRules, vocabulary: Vocabulary) -> None:
        self._format = tool_format
        self._rules = rules
        self._vocabulary = vocabulary
        # What follows a call.
        self._more = self._literal(tool_format.last)
        if rules.is_parallel:
            self._more = f"({self._literal(tool_format.next)} call)* {self._more}"

    def lines(self) -> Iterator[str]:
        """The rules, `start` first."""
        if self._rules.is_required:
            yield f"start: {self._calls()}"
        elif self._rules.content is not None:
            if self._format.marker is None:
                # Both begin with the same characters, among which the library's lexer does not look ahead.
                raise InvalidRequest(
                    f"text of a form cannot be told from calls in the format {self._format.name!r} of this model; "
                    "leave one of them out, or give tool_choice 'none' or 'required'"
                )
            yield f"start: content | {self._calls()}"
            yield f"content: %lark {{\n{self._rules.content}\n}}"
        elif self._format.marker is not None:
            yield from self._text_then_calls(self._format.marker)
        else:
            yield from self._text_or_calls()
        yield from self._call()

    def _text_then_calls(self, marker: str) -> Iterator[str]:
        """Text up to the first marker, and calls behind it if there is one."""
        rest = f"{self._literal(self._format.first.removeprefix(marker))} call {self._more}"
        if marker in self._vocabulary.marks:
            yield f"start: text ({self._literal(marker)} {rest})?"
        else:
            yield f"start: text | text opening {rest}"
            yield f"opening[lazy]: {_regex(_ANY_TEXT + re.escape(marker))}"
        # Also where the marker is a token: its letters must not come as other tokens.
        yield from self._text(f"& ~{_regex(_ANY_TEXT + re.escape(marker) + _ANY_TEXT)}")

    def _text_or_calls(self) -> Iterator[str]:
        """Text that does not begin like a call, or calls from the beginning on."""
        names = [function.name for function in self._rules.functions]
        white_space = WHITE_SPACE.encode("unicode_escape").decode()
        openings = [f"[{white_space}]*" + re.escape(marker) for marker in self._format.markers(names)]
        alternatives = [self._head(), *(f"opening_{i} rest_{i} {self._more}" for i in range(len(names)))]
        yield f"start: {' | '.join(alternatives)}"
        for i, opening in enumerate(openings):
            yield f"opening_{i}[lazy]: {_regex(opening)}"
            yield f"rest_{i}: {self._arguments(i, self._format.between[1:])}"
        like_calls = f"(?:{'|'.join(openings)}){_ANY_TEXT}"
        yield f"HEAD: {_regex(_SOME_TEXT)} & ~{_regex(like_calls)}"
        if self._vocabulary.visible_ids:
            yield from self._text("")

    def _head(self) -> str:
        visible = self._visible()
        return f"HEAD? ({visible} text)?" if visible else "HEAD?"

    def _text(self, condition: str) -> Iterator[str]:
        # Never two TEXT in a row: a condition on the whole would then hold for neither.
        visible = self._visible()
        yield f"text: TEXT? ({visible} TEXT?)*" if visible else "text: TEXT?"
        yield f"TEXT: {_regex(_SOME_TEXT)} {condition}"

    def _calls(self) -> str:
        return f"{self._literal(self._format.first)} call {self._more}"

    def _call(self) -> Iterator[str]:
        functions = self._rules.functions
        yield f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"
        for i, function in enumerate(functions):
            yield f"call_{i}: {self._arguments(i, function.name + self._format.between)}"
            yield f"arguments_{i}: {json_rule(arguments_schema(function))}"

    def _arguments(self, index: int, before: str) -> str:
        return f"{self._literal(before)} arguments_{index} {self._literal(self._format.after)}"

    def _visible(self) -> str:
        return _token(*self._vocabulary.visible_ids) if self._vocabulary.visible_ids else ""

    def _literal(self, text: str) -> str:
        """The text, its marks as the tokens they are; empty for no text."""
        marks = self._vocabulary.marks
        if not marks:
            return to_json(text) if text else ""
        parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
        return " ".join(_token(marks[part]) if part in marks else to_json(part) for part in parts if part)


def _token(*token_ids: int) -> str:
    return f"<[{','.join(map(str, token_ids))}]>"


def _regex(pattern: str) -> str:
    return "/" + pattern.replace("/", r"\/") + "/"
