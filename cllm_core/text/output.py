"""How the output of one request is read: its reasoning, its content and its calls of functions, whatever the format."""

from typing import Protocol

import msgspec

from cllm_core.text.marks import without_marks
from cllm_core.text.reasoning.reader import ReasoningReader
from cllm_core.text.tools.reader import CallDelta, CallReader


class ReadOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What a piece of text added."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()

    def followed_by(self, later: "ReadOutput") -> "ReadOutput":
        """This and what comes next as one."""
        return ReadOutput(
            reasoning=self.reasoning + later.reasoning,
            content=self.content + later.content,
            calls=self.calls + later.calls,
        )


class OutputReader(Protocol):
    """Reads one output that arrives in pieces, marks before its tokens (see `marks`)."""

    @property
    def is_calling(self) -> bool:
        """Whether no content follows."""
        ...

    @property
    def is_reasoning(self) -> bool:
        """Whether reasoning has begun and not ended."""
        ...

    @property
    def is_undecided(self) -> bool:
        """Whether it is not known yet if what came last is reasoning."""
        ...

    @property
    def num_content(self) -> int:
        """Characters of content so far, with what may be content and is held back."""
        ...

    def push(self, text: str) -> ReadOutput:
        """Take the next piece and return what it adds; EngineFailed where a call is not in its format."""
        ...

    def peek(self, text: str) -> str:
        """Return the content that `push` would, and stay as before: for text that may yet change."""
        ...

    def flush(self) -> ReadOutput:
        """Return what was held back; call it where the output ends."""
        ...


class PartsReader:
    """Reads reasoning first, then content with calls behind it; each may be absent."""

    def __init__(self, reasoning: ReasoningReader | None, calls: CallReader | None) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._num_content = 0

    @property
    def is_calling(self) -> bool:
        """As OutputReader."""
        return self._calls is not None and self._calls.is_calling

    @property
    def is_reasoning(self) -> bool:
        """As OutputReader."""
        return self._reasoning is not None and self._reasoning.is_reasoning

    @property
    def is_undecided(self) -> bool:
        """As OutputReader."""
        return self._reasoning is not None and self._reasoning.is_undecided

    @property
    def num_content(self) -> int:
        """As OutputReader."""
        return self._num_content if self._reasoning is None else self._reasoning.num_answered

    def push(self, text: str) -> ReadOutput:
        """As OutputReader."""
        if self._reasoning is None:
            self._num_content += len(text)
            return self._answer(without_marks(text))
        read = self._reasoning.push(text)
        answer = self._answer(read.answer)
        return ReadOutput(reasoning=read.reasoning, content=answer.content, calls=answer.calls)

    def _answer(self, text: str) -> ReadOutput:
        if self._calls is None or not text:
            return ReadOutput(content=text)
        read = self._calls.push(text)
        return ReadOutput(content=read.content, calls=read.calls)

    def peek(self, text: str) -> str:
        """As OutputReader."""
        if self._reasoning is not None and not self._reasoning.is_answering:
            return ""
        return text if self._calls is None else self._calls.peek(text)

    def flush(self) -> ReadOutput:
        """As OutputReader."""
        if self._reasoning is None:
            return ReadOutput(content=self._calls.flush() if self._calls is not None else "")
        held = self._reasoning.flush()
        answer = self._answer(held.answer)
        rest = self._calls.flush() if self._calls is not None else ""
        return ReadOutput(reasoning=held.reasoning, content=answer.content + rest, calls=answer.calls)
