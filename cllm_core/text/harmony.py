"""The harmony format of gpt-oss: an output is messages on channels, of which reasoning and calls are two kinds.

    <|channel|>analysis<|message|>The user ...<|end|><|start|>assistant                 reasoning
    <|channel|>commentary to=functions.get <|constrain|>json<|message|>{"x": 1}<|call|>   a call
    <|channel|>final<|message|>Hello!<|return|>                                         content

The prompt ends with `<|start|>assistant`. A message on the channel `commentary` without a recipient is content that
comes before calls. `<|call|>` and `<|return|>` end an output, so it holds one call at most.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from cllm_core.text.lark import Vocabulary, free_text, text_until
from cllm_core.text.marks import num_held, with_marks, without_marks
from cllm_core.text.output import ReadOutput
from cllm_core.text.reasoning.formats import Reasoning
from cllm_core.text.tools.functions import Function
from cllm_core.text.tools.grammar import CallRules, call_rules
from cllm_core.text.tools.reader import CallDelta
from cllm_core.text.tools.skeleton import ToolFormat

_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_ENDS = (_END, "<|call|>", "<|return|>", _START)
_RECIPIENT = re.compile(r"to=functions\.([A-Za-z0-9_-]+)")
_MAX_MESSAGES = 16  # before the last one of an output that follows a grammar
_BETWEEN_MESSAGES = "\n\n"

_Kind = Literal["header", "reasoning", "content", "call"]


def harmony_grammar(
    tool_format: ToolFormat,
    rules: CallRules | None,
    content: str | None,
    expected: Reasoning,
    vocabulary: Vocabulary,
) -> str:
    """The grammar of an output.

    Args:
        rules: of the calls that it may make, None for none.
        content: grammar that its last message has to match where it is no call; None leaves it free.
        vocabulary: marks of the format among its marks.

    Raises:
        InvalidRequest: the schema of a strict function cannot be enforced.
    """
    last = [] if rules is not None and rules.is_required else ["final"]
    last += [] if rules is None else ["call_message"]
    lines = [*_messages(last, is_open=expected.state == "open", vocabulary=vocabulary)]
    if "final" in last:
        lines.append(f"final: {vocabulary.literal(f'{_CHANNEL}final{_MESSAGE}')} content")
        lines += (
            free_text("content", vocabulary.visible_ids) if content is None else [f"content: %lark {{\n{content}\n}}"]
        )
    if rules is not None:
        lines.append(f"call_message: {vocabulary.literal(tool_format.first)} call")
        lines += call_rules(tool_format, rules, vocabulary)
    return "\n".join(lines)


def _messages(last: Sequence[str], *, is_open: bool, vocabulary: Vocabulary) -> Iterator[str]:
    """Rules for any reasoning before the last message, and for content before a call."""
    literal = vocabulary.literal
    next_message = literal(_START + "assistant")
    opened = f"to_end {next_message}" if is_open else ""
    yield f"start: {opened} (before {next_message}){{0,{_MAX_MESSAGES}}} ({' | '.join(last)})"
    channels = ["analysis", "commentary"] if len(last) > 1 else ["analysis"]
    yield f"before: ({' | '.join(literal(_CHANNEL + channel + _MESSAGE) for channel in channels)}) to_end"
    yield from text_until("to_end", _END, vocabulary, visible_ids=vocabulary.visible_ids)


class HarmonyReader:
    """Reads one output.

    Args:
        functions: that it may call; a message to any other is content.
        marks: of the format that are tokens.
        is_required: a call is wanted, so nothing is content.
        separates: what is on the channel of reasoning is told from content.
    """

    def __init__(
        self,
        expected: Reasoning,
        functions: Sequence[Function],
        marks: Collection[str],
        *,
        is_required: bool = False,
        separates: bool = True,
    ) -> None:
        self._separates = separates
        self._names = {function.name for function in functions}
        self._is_required = is_required
        self._message, self._ends = with_marks(_MESSAGE, marks), [with_marks(end, marks) for end in _ENDS]
        self._openings = [with_marks(text, marks) for text in (_CHANNEL, _START)] + [" to=", "to="]
        self._pending = ""
        self._kind: _Kind = "header" if expected.state != "open" else self._kind_of("analysis")
        self._num_calls = 0
        self._num_content = 0
        self._has = {"reasoning": False, "content": False}  # something of an earlier message

    @property
    def is_calling(self) -> bool:
        """Whether no content follows."""
        return self._is_required or self._num_calls > 0

    @property
    def is_reasoning(self) -> bool:
        """Whether the text is reasoning now."""
        return self._kind == "reasoning"

    @property
    def is_undecided(self) -> bool:
        """Whether it is not known yet what the message will be."""
        return self._kind == "header"

    @property
    def num_content(self) -> int:
        """Characters of content so far, with those held back."""
        return self._num_content + (len(without_marks(self._pending)) if self._kind == "content" else 0)

    def push(self, text: str) -> ReadOutput:
        """Take the next piece and return what it adds."""
        self._pending += text
        read = ReadOutput()
        while self._pending and (part := self._step()) is not None:
            read = read.followed_by(part)
        self._num_content += len(read.content)
        return read

    def peek(self, text: str) -> str:
        """Return the content that `push` would, where the text goes on with the message that has begun."""
        return without_marks(self._split(self._pending + text)[0]) if self._kind == "content" else ""

    def flush(self) -> ReadOutput:
        """Return what was held back; call it where the output ends."""
        held, self._pending = self._pending, ""
        if self._kind == "header":
            # A header that was cut, unless nothing in it is one.
            return ReadOutput()
        return self._text(held)

    def _step(self) -> ReadOutput | None:
        return self._read_header() if self._kind == "header" else self._read_body()

    def _read_header(self) -> ReadOutput | None:
        head, found, rest = self._pending.partition(self._message)
        if found:
            self._pending = rest
            return self._begin(without_marks(head))
        if any(opening.startswith(head) or head.startswith(opening) for opening in self._openings):
            return None
        return self._begin("final")  # the model does not keep to the format: all is content

    def _begin(self, header: str) -> ReadOutput:
        recipient = _RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self._names:
            self._kind = "call"
            self._num_calls += 1
            return ReadOutput(calls=(CallDelta(index=self._num_calls - 1, name=recipient[1]),))
        self._kind = self._kind_of(header)
        if not self._has[self._kind]:
            return ReadOutput()
        return self._text(_BETWEEN_MESSAGES)

    def _kind_of(self, header: str) -> Literal["reasoning", "content"]:
        return "reasoning" if "analysis" in header and self._separates else "content"

    def _read_body(self) -> ReadOutput | None:
        text, is_ended = self._split(self._pending)
        self._pending = self._pending[len(text) :]
        read = self._text(text)
        if is_ended:
            self._pending = self._pending.removeprefix(self._first_end())
            self._has[self._kind] = True
            self._kind = "header"
        return read if text or is_ended else None

    def _first_end(self) -> str:
        """What ends the message, as far as it is no part of the next one."""
        end = next(end for end in self._ends if self._pending.startswith(end))
        return "" if end.endswith(_START) else end

    def _text(self, text: str) -> ReadOutput:
        text = without_marks(text)
        match self._kind:
            case "reasoning":
                return ReadOutput(reasoning=text)
            case "call":
                calls = (CallDelta(index=self._num_calls - 1, arguments=text),) if text else ()
                return ReadOutput(calls=calls)
            case _:
                return ReadOutput(content="" if self.is_calling else text)

    def _split(self, text: str) -> tuple[str, bool]:
        """The text of the message that can be given, and whether its end follows."""
        places = [place for end in self._ends if (place := text.find(end)) >= 0]
        if places:
            return text[: min(places)], True
        return text[: len(text) - max(num_held(text, end) for end in self._ends)], False
