"""The items of an input: messages, calls and their results, in the forms in which clients send them."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    WrapValidator,
)

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from server.openai.shared.api_model import ApiModel
from server.openai.shared.calls import Arguments, CalledFunction, MessageToolCall
from server.openai.shared.content import Content
from server.openai.shared.tools import parse_by_type

# Fields of an output item that clients send back with the next input.
_ITEM_LABELS = frozenset({"id", "status"})


class InputMessage(ApiModel):
    """One message of the conversation so far."""

    path_prefix: ClassVar[str] = "input."
    keeps_empty: ClassVar[frozenset[str]] = frozenset({"content"})

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class InputCall(ApiModel):
    """A call that an earlier answer made."""

    path_prefix: ClassVar[str] = "input."

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    arguments: Arguments

    def to_chat(self) -> MessageToolCall:
        """The call in the words of chat completions."""
        called = CalledFunction(name=self.name, arguments=self.arguments)
        return MessageToolCall(id=self.call_id, type="function", function=called)


class InputResult(ApiModel):
    """The result of a call."""

    path_prefix: ClassVar[str] = "input."

    type: Literal["function_call_output"]
    call_id: str
    output: Content


InputItem = InputMessage | InputCall | InputResult


_ITEM_FORMS: Mapping[str, type[ApiModel]] = {
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": InputResult,
}


def _parse_item(item: object, _: object) -> object:
    if not isinstance(item, dict):
        raise InvalidRequest("input: an item must be an object", param="input")
    told = {"type": "message"} | {name: value for name, value in item.items() if name not in _ITEM_LABELS}
    parsed = parse_by_type(_ITEM_FORMS, told)
    if parsed is None:
        raise UnsupportedParameter(
            f"input item of type {told['type']!r}: only {', '.join(_ITEM_FORMS)} are supported", param="input"
        )
    return parsed


def _check_input(value: object) -> object:
    """Turn a text into a message, and refuse what is no list of items."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InvalidRequest("input: must be a string or a list of items, not empty", param="input")
    return value


Input = Annotated[
    list[Annotated[InputItem, WrapValidator(_parse_item)]],
    BeforeValidator(_check_input, json_schema_input_type=str | list[InputItem]),
]
