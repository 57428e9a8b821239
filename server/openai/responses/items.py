"""The items of an answer while they grow, and the events that tell of it."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ..chat.answer import ChosenTokenLogprob
from ..shared.answers import new_call_id
from .answer import (
    FunctionCallItem,
    ItemStatus,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    SummaryText,
)
from .events import (
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    EventLogprob,
    EventTopLogprob,
    PartEvent,
    ReasoningDeltaEvent,
    ReasoningDoneEvent,
    ResponseEvent,
    SummaryDeltaEvent,
    SummaryDoneEvent,
    SummaryPartEvent,
    TextDeltaEvent,
    TextDoneEvent,
)


class InItem(TypedDict):
    """Fields of every event about an item."""

    item_id: str
    output_index: int


@dataclass(slots=True, kw_only=True)
class _Growing:
    """What all items have.

    Attributes:
        index: of the item in the answer.
    """

    index: int
    item_id: str

    @property
    def place(self) -> InItem:
        return {"item_id": self.item_id, "output_index": self.index}


@dataclass(slots=True, kw_only=True)
class GrowingText(_Growing):
    """The text of an answer."""

    item_id: str = field(default_factory=lambda: new_item_id("msg"))
    text: str = ""
    logprobs: list[ChosenTokenLogprob] = field(default_factory=list)

    def body(self, status: ItemStatus) -> OutputMessage:
        """The item, with its only part unless it has just begun."""
        content = [] if status == "in_progress" else [self._part()]
        return OutputMessage(id=self.item_id, status=status, content=content)

    def begun(self) -> Iterable[ResponseEvent]:
        """Events that follow the beginning of the item."""
        yield PartEvent(type="response.content_part.added", **self.place, part=self._part())

    def grown(self, text: str, logprobs: Sequence[ChosenTokenLogprob]) -> ResponseEvent:
        """The event that tells of new text, added here."""
        self.text += text
        self.logprobs += logprobs
        return TextDeltaEvent(**self.place, delta=text, logprobs=_event_logprobs(logprobs))

    def ended(self) -> Iterable[ResponseEvent]:
        """Events that precede the end of the item."""
        yield TextDoneEvent(**self.place, text=self.text, logprobs=_event_logprobs(self.logprobs))
        yield PartEvent(type="response.content_part.done", **self.place, part=self._part())

    def _part(self) -> OutputText:
        return OutputText(text=self.text, annotations=[], logprobs=list(self.logprobs))


@dataclass(slots=True, kw_only=True)
class GrowingReasoning(_Growing):
    """What the model thinks.

    Attributes:
        is_summary: given as a summary, which some clients show where they show no reasoning.
    """

    item_id: str = field(default_factory=lambda: new_item_id("rs"))
    is_summary: bool
    text: str = ""

    def body(self, status: ItemStatus) -> ReasoningItem:
        """The item, empty when it has just begun."""
        has_text = status != "in_progress"
        return ReasoningItem(
            id=self.item_id,
            status=status,
            summary=[SummaryText(text=self.text)] if has_text and self.is_summary else [],
            content=[ReasoningText(text=self.text)] if has_text and not self.is_summary else None,
            encrypted_content=None,
        )

    def begun(self) -> Iterable[ResponseEvent]:
        """Events that follow the beginning of the item."""
        if self.is_summary:
            yield SummaryPartEvent(
                type="response.reasoning_summary_part.added", **self.place, part=SummaryText(text=self.text)
            )
        else:
            yield PartEvent(type="response.content_part.added", **self.place, part=ReasoningText(text=self.text))

    def grown(self, text: str) -> ResponseEvent:
        """The event that tells of new text, added here."""
        self.text += text
        if self.is_summary:
            return SummaryDeltaEvent(**self.place, delta=text)
        return ReasoningDeltaEvent(**self.place, delta=text)

    def ended(self) -> Iterable[ResponseEvent]:
        """Events that precede the end of the item."""
        if self.is_summary:
            yield SummaryDoneEvent(**self.place, text=self.text)
            yield SummaryPartEvent(
                type="response.reasoning_summary_part.done", **self.place, part=SummaryText(text=self.text)
            )
        else:
            yield ReasoningDoneEvent(**self.place, text=self.text)
            yield PartEvent(type="response.content_part.done", **self.place, part=ReasoningText(text=self.text))


@dataclass(slots=True, kw_only=True)
class GrowingCall(_Growing):
    """A call of a function."""

    item_id: str = field(default_factory=lambda: new_item_id("fc"))
    call_id: str = field(default_factory=new_call_id)
    name: str
    arguments: str = ""

    def body(self, status: ItemStatus) -> FunctionCallItem:
        """The item."""
        return FunctionCallItem(
            id=self.item_id, call_id=self.call_id, name=self.name, arguments=self.arguments, status=status
        )

    def begun(self) -> Iterable[ResponseEvent]:
        """Events that follow the beginning of the item: none."""
        return ()

    def grown(self, arguments: str) -> ResponseEvent:
        """The event that tells of new arguments, added here."""
        self.arguments += arguments
        return ArgumentsDeltaEvent(**self.place, delta=arguments)

    def ended(self) -> Iterable[ResponseEvent]:
        """Events that precede the end of the item."""
        yield ArgumentsDoneEvent(**self.place, arguments=self.arguments)


GrowingItem = GrowingText | GrowingReasoning | GrowingCall


def new_item_id(prefix: str) -> str:
    """Id of an item, unlike any other."""
    return f"{prefix}_{uuid.uuid4().hex}"


def _event_logprobs(entries: Sequence[ChosenTokenLogprob]) -> list[EventLogprob]:
    """Without the tokens' bytes, which events do not have."""
    return [
        EventLogprob(
            token=entry.token,
            logprob=entry.logprob,
            top_logprobs=[EventTopLogprob(token=top.token, logprob=top.logprob) for top in entry.top_logprobs],
        )
        for entry in entries
    ]
