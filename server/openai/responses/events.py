"""The events of a streamed answer."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from .answer import (
    OutputItem,
    OutputText,
    ReasoningText,
    ResponseBody,
    SummaryText,
)


class ResponseEvent(BaseModel):
    """One event of a stream.

    Attributes:
        sequence_number: counts the events of a stream from 0; set where the event is sent.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    type: str
    sequence_number: int = 0


class StatusEvent(ResponseEvent):
    """The response began or ended."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: ResponseBody


class ItemEvent(ResponseEvent):
    """An item of the answer began or ended."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class InItemEvent(ResponseEvent):
    """Something happened in an item."""

    item_id: str
    output_index: int


class ArgumentsDeltaEvent(InItemEvent):
    """A piece of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    delta: str


class ArgumentsDoneEvent(InItemEvent):
    """The whole arguments of a call."""

    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    arguments: str


class InPartEvent(InItemEvent):
    """Something happened in an item's only part."""

    content_index: Literal[0] = 0


class PartEvent(InPartEvent):
    """The part began or ended."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText | ReasoningText


class EventTopLogprob(BaseModel):
    """An alternative to a token."""

    token: str
    logprob: float


class EventLogprob(EventTopLogprob):
    """A token and its log-probability, as events have them."""

    top_logprobs: list[EventTopLogprob]


class TextDeltaEvent(InPartEvent):
    """Text that is new."""

    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    delta: str
    logprobs: list[EventLogprob]


class TextDoneEvent(InPartEvent):
    """The whole text."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    text: str
    logprobs: list[EventLogprob]


class ReasoningDeltaEvent(InPartEvent):
    """What is new of what the model thinks."""

    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"
    delta: str


class ReasoningDoneEvent(InPartEvent):
    """All that the model thought."""

    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"
    text: str


class InSummaryEvent(InItemEvent):
    """Something happened in the only part of a summary."""

    summary_index: Literal[0] = 0


class SummaryPartEvent(InSummaryEvent):
    """The part began or ended."""

    type: Literal["response.reasoning_summary_part.added", "response.reasoning_summary_part.done"]
    part: SummaryText


class SummaryDeltaEvent(InSummaryEvent):
    """What is new of the summary."""

    type: Literal["response.reasoning_summary_text.delta"] = "response.reasoning_summary_text.delta"
    delta: str


class SummaryDoneEvent(InSummaryEvent):
    """The whole summary."""

    type: Literal["response.reasoning_summary_text.done"] = "response.reasoning_summary_text.done"
    text: str


RESPONSE_EVENTS = (
    StatusEvent,
    ItemEvent,
    PartEvent,
    TextDeltaEvent,
    TextDoneEvent,
    ReasoningDeltaEvent,
    ReasoningDoneEvent,
    SummaryPartEvent,
    SummaryDeltaEvent,
    SummaryDoneEvent,
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
)
"""Every event that a stream may hold."""
