"""Splits one output into its reasoning and its answer; how it was cut into pieces changes nothing.

    text       <think>\\nThe user greets.\\n</think>\\n\\nHello!
    reasoning             The user greets.
    answer                                             Hello!

White space between the two belongs to neither. A tag that is a token counts only where that token came (see `marks`).
"""

from collections.abc import Callable, Collection, Mapping
from typing import Literal

import msgspec

from cllm_core.text.marks import num_held, with_marks, without_marks
from cllm_core.text.reasoning.formats import Reasoning

_Phase = Literal["undecided", "reasoning", "between", "answer"]


class ReasonedText(msgspec.Struct, frozen=True):
    """What a piece of text added."""

    reasoning: str = ""
    answer: str = ""


class ReasoningReader:
    """Reads one output.

    Args:
        expected: what the prompt lets expect.
        marks: of the format that are tokens.
    """

    def __init__(self, expected: Reasoning, marks: Collection[str]) -> None:
        tags = expected.format
        self._start, self._end, self._answer_start, self._answer_end = (
            with_marks(tag, [mark for mark in tags.tokens if mark in marks])
            for tag in (tags.start, tags.end, tags.answer_start, tags.answer_end)
        )
        self._pending = ""
        self._has_reasoning = False
        self._num_answered = 0
        phases: Mapping[str, _Phase] = {"open": "reasoning", "possible": "undecided", "ended": "between"}
        self._phase: _Phase = phases[expected.state]

    @property
    def is_reasoning(self) -> bool:
        """Whether the reasoning has begun and not ended."""
        return self._phase == "reasoning"

    @property
    def is_undecided(self) -> bool:
        """Whether reasoning may yet begin."""
        return self._phase == "undecided"

    @property
    def is_answering(self) -> bool:
        """Whether the answer has begun."""
        return self._phase == "answer"

    @property
    def num_answered(self) -> int:
        """Characters of the answer so far, or of what is one unless it turns out to begin reasoning."""
        return len(without_marks(self._pending)) if self.is_undecided else self._num_answered

    def push(self, text: str) -> ReasonedText:
        """Take the next piece and return what it adds."""
        self._pending += text
        reasoning, answer = [], []
        steps: dict[str, Callable[[], ReasonedText | None]] = {
            "undecided": self._decide,
            "reasoning": self._read_reasoning,
            "between": self._read_between,
            "answer": self._read_answer,
        }
        while self._pending and (read := steps[self._phase]()) is not None:
            reasoning.append(read.reasoning)
            answer.append(read.answer)
        self._num_answered += sum(map(len, answer))
        return ReasonedText("".join(reasoning), "".join(answer))

    def flush(self) -> ReasonedText:
        """Return what was held back; call it where the output ends.

        The beginning of a tag that was cut is reasoning or answer: nothing tells the two apart.
        """
        held, self._pending = without_marks(self._pending), ""
        if self.is_reasoning:
            return ReasonedText(reasoning=held.rstrip())
        return ReasonedText(answer="" if self._phase == "between" and not held.strip() else held)

    # Each of these reads what it can of one phase; None where more text is needed.

    def _decide(self) -> ReasonedText | None:
        text = self._pending.lstrip()
        if text.startswith(self._start):
            self._phase = "reasoning"
            self._pending = text[len(self._start) :]
        elif self._start.startswith(text) or self._answer_start.startswith(text):
            return None
        elif self._answer_start and text.startswith(self._answer_start):
            self._phase = "between"
        else:
            self._phase = "answer"
        return ReasonedText()

    def _read_reasoning(self) -> ReasonedText | None:
        inside, tag, rest = self._pending.partition(self._end)
        if tag:
            self._phase, self._pending = "between", rest
            return ReasonedText(reasoning=self._inside(inside.rstrip()))
        safe = inside[: len(inside) - num_held(inside, self._end)].rstrip()
        self._pending = inside[len(safe) :]
        return ReasonedText(reasoning=self._inside(safe)) if safe else None

    def _inside(self, text: str) -> str:
        text = without_marks(text)
        text = text if self._has_reasoning else text.lstrip()
        self._has_reasoning = self._has_reasoning or bool(text)
        return text

    def _read_between(self) -> ReasonedText | None:
        text = self._pending.lstrip()
        if self._answer_start and text.startswith(self._answer_start):
            self._pending = text[len(self._answer_start) :]
            self._answer_start = ""
        elif not text or self._answer_start.startswith(text):
            self._pending = text
            return None
        else:
            self._phase, self._pending = "answer", text
        return ReasonedText()

    def _read_answer(self) -> ReasonedText | None:
        answer, tag, rest = self._pending.partition(self._answer_end) if self._answer_end else (self._pending, "", "")
        if tag:
            self._answer_start = self._answer_end = ""
            self._phase, self._pending = "between", rest  # white space behind it is no part of the answer either
            return ReasonedText(answer=without_marks(answer.rstrip()))
        if not self._answer_end:
            self._pending = ""
            return ReasonedText(answer=without_marks(answer))
        safe = answer[: len(answer) - num_held(answer, self._answer_end)].rstrip()
        self._pending = answer[len(safe) :]
        return ReasonedText(answer=without_marks(safe)) if safe else None
