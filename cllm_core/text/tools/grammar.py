"""The grammar of an output that may or must call functions: what a model writes behind a marker is a valid call.

Written in the Lark dialect of the llguidance library (see `lark`). Fixed strings leave the model no choice, so most of
a call needs no guessing.
"""

from collections.abc import Iterator

import msgspec

from cllm_core.errors import InvalidRequest
from cllm_core.text.lark import (
    ANY_TEXT,
    WHITE_SPACE,
    Excluded,
    Vocabulary,
    escape,
    free_text,
    regex,
    text_up_to,
)
from cllm_core.text.tools.functions import Function
from cllm_core.text.tools.skeleton import MAX_CALLS, ToolFormat


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


def calls_grammar(
    tool_format: ToolFormat, rules: CallRules, vocabulary: Vocabulary, *, not_first: Excluded | None = None
) -> str:
    """The grammar, for SamplingParams.grammar.

    Args:
        not_first: what free text must not begin with.

    Raises:
        InvalidRequest: the format cannot be told from text that has to match a grammar, or the schema of a strict
            function cannot be enforced.
    """
    return "\n".join(_Writer(tool_format, rules, vocabulary, not_first).lines())


def call_rules(tool_format: ToolFormat, rules: CallRules, vocabulary: Vocabulary) -> Iterator[str]:
    """Rules for one call, from the function's name to what follows the arguments: the rule `call` and its parts."""
    yield f"call: {' | '.join(f'call_{i}' for i in range(len(rules.functions)))}"
    for i, function in enumerate(rules.functions):
        head = vocabulary.literal(function.name + tool_format.between)
        yield f"call_{i}: {head} arguments_{i} {vocabulary.literal(tool_format.after)}"
        yield from tool_format.style.rules(f"arguments_{i}", function, vocabulary)


class _Writer:
    def __init__(
        self, tool_format: ToolFormat, rules: CallRules, vocabulary: Vocabulary, not_first: Excluded | None
    ) -> None:
        self._format = tool_format
        self._rules = rules
        self._vocabulary = vocabulary
        self._literal = vocabulary.literal
        self._not_first = not_first
        # What follows a call.
        self._more = self._literal(tool_format.last)
        if rules.is_parallel:
            self._more = f"({self._literal(tool_format.next)} call){{0,{MAX_CALLS - 1}}} {self._more}"

    def lines(self) -> Iterator[str]:
        """The rules, `start` first."""
        calls = f"{self._literal(self._format.first)} call {self._more}"
        if self._rules.is_required:
            yield f"start: {calls}"
        elif self._rules.content is not None:
            if self._format.marker is None:
                # Both begin with the same characters, among which the library's lexer does not look ahead.
                raise InvalidRequest(
                    f"text of a form cannot be told from calls in the format {self._format.name!r} of this model; "
                    "leave one of them out, or give tool_choice 'none' or 'required'"
                )
            yield f"start: content | {calls}"
            yield f"content: %lark {{\n{self._rules.content}\n}}"
        elif self._format.marker is not None:
            yield from self._text_then_calls(self._format.marker)
        else:
            yield from self._text_or_calls()
        yield from call_rules(self._format, self._rules, self._vocabulary)

    def _text_then_calls(self, marker: str) -> Iterator[str]:
        """Text up to the first marker, and calls behind it if there is one."""
        rest = self._literal(self._format.first.removeprefix(marker))
        yield f"start: text | text text_end {rest} call {self._more}"
        visible_ids = self._vocabulary.visible_ids
        yield from text_up_to("text", marker, self._vocabulary, visible_ids=visible_ids, not_first=self._not_first)

    def _text_or_calls(self) -> Iterator[str]:
        """Text that does not begin like a call, or calls from the beginning on."""
        names = [function.name for function in self._rules.functions]
        openings = [WHITE_SPACE + escape(marker) for marker in self._format.markers(names)]
        alternatives = [f"opening_{i} rest_{i} {self._more}" for i in range(len(names))]
        yield f"start: text | {' | '.join(alternatives)}"
        for i, opening in enumerate(openings):
            yield f"opening_{i}[lazy]: {regex(opening)}"
            rest = f"{self._literal(self._format.between[1:])} arguments_{i} {self._literal(self._format.after)}"
            yield f"rest_{i}: {rest}"
        like_calls = "& ~" + regex(f"(?:{'|'.join(openings)}){ANY_TEXT}")
        yield from free_text("text", self._vocabulary.visible_ids, first=like_calls, not_first=self._not_first)
