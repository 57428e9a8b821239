"""From the items of a conversation to the messages of a chat."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from cllm_core.errors import InvalidRequest

from ..chat.messages import Message
from ..shared.calls import CalledFunction, MessageToolCall
from .input_items import InputCall, InputMessage, InputReasoning, InputResult, ReadableItem


@dataclass(slots=True)
class _Turn:
    """A message while items are added to it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = ""
    thoughts: list[str] = field(default_factory=list)
    calls: list[MessageToolCall] = field(default_factory=list)
    call_id: str | None = None

    @property
    def only_thinks(self) -> bool:
        """Whether it is an answer of which nothing but the beginning is known."""
        return bool(self.thoughts) and not self.content and not self.calls

    def to_message(self) -> Message:
        return Message(
            role=self.role,
            content=self.content,
            reasoning_content="\n".join(filter(None, self.thoughts)) or None,
            tool_calls=self.calls or None,
            tool_call_id=self.call_id or None,
        )


def to_messages(items: Iterable[ReadableItem], *, instructions: str | None) -> list[Message]:
    """Chat messages, with one system message at their beginning: many chat templates allow no more.

    Args:
        instructions: stand before the system and developer messages that begin the conversation.

    Raises:
        InvalidRequest: there are none.
    """
    turns = _turns(items)
    if not turns:
        raise InvalidRequest("input: has no item that this server can read; send a message", param="input")
    leading = list(takewhile(lambda turn: turn.role in ("system", "developer"), turns))
    texts = [] if instructions is None else [instructions]
    texts += [turn.content for turn in leading]
    if texts:
        turns[: len(leading)] = [_Turn("developer", "\n\n".join(texts))]
    return [turn.to_message() for turn in turns]


def _turns(items: Iterable[ReadableItem]) -> list[_Turn]:
    """What an answer thought, said and called, in this order, is one message."""
    turns: list[_Turn] = []
    for item in items:
        match item:
            case InputMessage():
                if item.role != "assistant" or not turns or not turns[-1].only_thinks:
                    turns.append(_Turn(item.role))
                turns[-1].content = item.content
            case InputResult():
                turns.append(_Turn("tool", item.output, call_id=item.call_id))
            case InputReasoning():
                if not turns or not turns[-1].only_thinks:
                    turns.append(_Turn("assistant"))
                turns[-1].thoughts.append(item.text)
            case InputCall():
                if not turns or turns[-1].role != "assistant":
                    turns.append(_Turn("assistant"))
                called = CalledFunction(name=item.name, arguments=item.arguments)
                turns[-1].calls.append(MessageToolCall(id=item.call_id, type="function", function=called))
    return [turn for turn in turns if not turn.only_thinks]
