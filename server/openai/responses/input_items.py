"""The items of an input: messages, calls and their results, in the forms in which clients send them."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WrapValidator,
)

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from server.openai.shared.api_model import ApiModel
from server.openai.shared.calls import Arguments, CalledFunction, MessageToolCall, check_results
from server.openai.shared.tools import FunctionName, parse_by_type

_TEXT_PARTS = ("input_text", "output_text", "text")


# Fields of an output item that clients send back with the next input.
_ITEM_LABELS = frozenset({"id", "status"})


def _text_of(content: object) -> object:
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise UnsupportedParameter(f"input: content part of type {kind!r}: only text is supported", param="input")
    return "\n".join(part["text"] for part in content)


Text = Annotated[str, BeforeValidator(_text_of)]


class InputMessage(ApiModel):
    """One message of the conversation so far."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class InputCall(ApiModel):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: FunctionName
    arguments: Arguments

    def to_chat(self) -> MessageToolCall:
        """The call in the words of chat completions."""
        called = CalledFunction(name=self.name, arguments=self.arguments)
        return MessageToolCall(id=self.call_id, type="function", function=called)


class InputResult(ApiModel):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text


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


def _check_input_results(items: list[InputItem]) -> list[InputItem]:
    steps = (
        (
            [item.call_id] if isinstance(item, InputCall) else [],
            item.call_id if isinstance(item, InputResult) else None,
        )
        for item in items
    )
    check_results(steps, lambda index: f"input.{index}.call_id")
    return items


Input = Annotated[
    list[Annotated[InputItem, WrapValidator(_parse_item)]],
    BeforeValidator(_check_input, json_schema_input_type=str | list[InputItem]),
    AfterValidator(_check_input_results),
]
