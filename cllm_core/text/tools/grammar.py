"""The grammar of an output that may or must call functions: what a model writes behind a marker is a valid call.

Written in the Lark dialect of the llguidance library (see `lark`). Fixed strings leave the model no choice, so most of
a call needs no guessing.
"""

from collections.abc import Iterator

import msgspec

from cllm_core.errors import InvalidRequest
from cllm_core.text.lark import ANY_TEXT, SOME_TEXT, Vocabulary, escape, regex, token, without
from cllm_core.text.tools.functions import Function
from cllm_core.text.tools.skeleton import MAX_CALLS, WHITE_SPACE, ToolFormat

_WHITE_SPACE = f"[{escape(WHITE_SPACE)}]*"


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
    tool_format: ToolFormat, rules: CallRules, vocabulary: Vocabulary, *, not_first: str | None = None
) -> str:
    """The grammar, for SamplingParams.grammar.

    Args:
        not_first: what free text must not begin with, white space aside, as it means something else there.

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
        self, tool_format: ToolFormat, rules: CallRules, vocabulary: Vocabulary, not_first: str | None
    ) -> None:
        self._format = tool_format
        self._rules = rules
        self._vocabulary = vocabulary
        self._literal = vocabulary.literal
        # A condition on the beginning of free text.
        self._begins = "" if not_first is None else f"& ~{regex(_WHITE_SPACE + escape(not_first) + ANY_TEXT)}"
        # What follows a call.
        self._more = self._literal(tool_format.last)
        if rules.is_parallel:
            self._more = f"({self._literal(tool_format.next)} call){{0,{MAX_CALLS - 1}}} {self._more}"

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
        yield from call_rules(self._format, self._rules, self._vocabulary)

    def _text_then_calls(self, marker: str) -> Iterator[str]:
        """Text up to the first marker, and calls behind it if there is one."""
        rest = f"{self._literal(self._format.first.removeprefix(marker))} call {self._more}"
        if marker in self._vocabulary.marks:
            yield f"start: text ({self._literal(marker)} {rest})?"
        else:
            yield f"start: text | text opening {rest}"
            yield "opening[lazy]: OPENING"
            yield f"OPENING: {regex(ANY_TEXT + escape(marker))} {self._begins}"
        # Also where the marker is a token: its letters must not come as other tokens.
        condition = without(marker)
        yield f"text: {self._head()}"
        yield f"HEAD: {regex(SOME_TEXT)} {condition} {self._begins}"
        yield from self._text(condition)

    def _text_or_calls(self) -> Iterator[str]:
        """Text that does not begin like a call, or calls from the beginning on."""
        names = [function.name for function in self._rules.functions]
        openings = [_WHITE_SPACE + escape(marker) for marker in self._format.markers(names)]
        alternatives = [self._head(), *(f"opening_{i} rest_{i} {self._more}" for i in range(len(names)))]
        yield f"start: {' | '.join(alternatives)}"
        for i, opening in enumerate(openings):
            yield f"opening_{i}[lazy]: {regex(opening)}"
            rest = f"{self._literal(self._format.between[1:])} arguments_{i} {self._literal(self._format.after)}"
            yield f"rest_{i}: {rest}"
        like_calls = f"(?:{'|'.join(openings)}){ANY_TEXT}"
        yield f"HEAD: {regex(SOME_TEXT)} & ~{regex(like_calls)} {self._begins}"
        yield from self._text("")

    def _head(self) -> str:
        """Free text from its beginning on; a condition holds for its first part alone."""
        visible = self._vocabulary.visible_ids
        return f"HEAD? ({token(*visible)} more_text)?" if visible else "HEAD?"

    def _text(self, condition: str) -> Iterator[str]:
        visible = self._vocabulary.visible_ids
        if visible:
            # Never two TEXT in a row: a condition on the whole would then hold for neither.
            yield f"more_text: TEXT? ({token(*visible)} TEXT?)*"
            yield f"TEXT: {regex(SOME_TEXT)} {condition}"

    def _calls(self) -> str:
        return f"{self._literal(self._format.first)} call {self._more}"
