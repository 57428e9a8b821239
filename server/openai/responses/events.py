"""The events of a streamed answer."""

from typing import Literal

from pydantic import (
    BaseModel,
)

from server.openai.responses.answer import OutputItem, OutputText, ResponseBody


class ResponseEvent(BaseModel):
    """One event of a stream; sequence_number counts them from 0."""

    type: str
    sequence_number: int


class StatusEvent(ResponseEvent):
    """The response began or ended."""

    response: ResponseBody


class ItemEvent(ResponseEvent):
    """An item of the answer began or ended."""

    output_index: int
    item: OutputItem


class InItemEvent(ResponseEvent):
    """Something happened in an item."""

    item_id: str
    output_index: int


class ArgumentsDeltaEvent(InItemEvent):
    """A piece of a call's arguments."""

    delta: str


class ArgumentsDoneEvent(InItemEvent):
    """The whole arguments of a call."""

    arguments: str


class InPartEvent(InItemEvent):
    """Something happened in a message's only part."""

    content_index: Literal[0]


class PartEvent(InPartEvent):
    """The part began or ended."""

    part: OutputText


class TextDeltaEvent(InPartEvent):
    """Text that is new."""

    delta: str
    logprobs: list[str]


class TextDoneEvent(InPartEvent):
    """The whole text."""

    text: str
    logprobs: list[str]


class ErrorEvent(ResponseEvent):
    """What ended the stream early."""

    code: str | None
    message: str
    param: str | None


RESPONSE_EVENTS = (
    StatusEvent,
    ItemEvent,
    PartEvent,
    TextDeltaEvent,
    TextDoneEvent,
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ErrorEvent,
)


"""Every event that a stream may hold."""
