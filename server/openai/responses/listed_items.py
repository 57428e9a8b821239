"""How items of inputs are stored and shown again: in the form in which OpenAI lists them."""

from .answer import (
    FunctionCallItem,
    FunctionOutputItem,
    InputMessageItem,
    InputTextPart,
    ListedItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    SummaryText,
)
from .input_items import InputCall, InputMessage, InputReasoning, InputResult, ReadableItem
from .items import new_item_id


def listed_item(item: ReadableItem) -> ListedItem:
    """The item under an id, its own where it has one."""
    match item:
        case InputMessage():
            return _message(item, item.id or new_item_id("msg"))
        case InputReasoning():
            return _reasoning(item, item.id or new_item_id("rs"))
        case InputCall():
            return FunctionCallItem(
                id=item.id or new_item_id("fc"),
                call_id=item.call_id,
                name=item.name,
                arguments=item.arguments,
                status="completed",
            )
        case InputResult():
            return FunctionOutputItem(
                id=item.id or new_item_id("fco"), call_id=item.call_id, output=item.output, status="completed"
            )


def _message(item: InputMessage, item_id: str) -> ListedItem:
    if item.role == "assistant":
        part = OutputText(text=item.content, annotations=[], logprobs=[])
        return OutputMessage(id=item_id, status="completed", content=[part])
    return InputMessageItem(id=item_id, status="completed", role=item.role, content=[InputTextPart(text=item.content)])


def _reasoning(item: InputReasoning, item_id: str) -> ReasoningItem:
    return ReasoningItem(
        id=item_id,
        status="completed",
        summary=[SummaryText(text=part.text) for part in item.summary or ()],
        content=[ReasoningText(text=part.text) for part in item.content] if item.content else None,
        encrypted_content=None,
    )
