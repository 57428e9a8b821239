"""The messages of a conversation."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from cllm_core.text.tools.conversation import Turn
from server.openai.shared.api_model import ApiModel, IsNeutral, client_side, only
from server.openai.shared.calls import MessageToolCall, check_results

Role = Literal["system", "developer", "user", "assistant", "tool"]


class TextPart(ApiModel):
    """A content part of type text, the only type served."""

    type: Literal["text"]
    text: str


def _check_content(value: object) -> object:
    """Name the unsupported part instead of listing every form that content may have."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequest("content: must be a string or a list of content parts, not empty")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise UnsupportedParameter(f"content part of type {kind!r}: only type 'text' is supported")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise InvalidRequest("content part of type 'text': needs a string 'text' and nothing else")
    return value


Content = Annotated[str | list[TextPart], BeforeValidator(_check_content)]


def content_text(content: str | list[TextPart] | None) -> str:
    """The text of a content field, its parts joined by line breaks."""
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content or ""


# Fields of a message that OpenAI's answers carry and clients send back; null or empty, they say nothing.
_EMPTY_MESSAGE_FIELDS: Mapping[str, IsNeutral] = {
    "annotations": only([]),
    "function_call": only(),
    "refusal": only(),
    "audio": only(),
    "parsed": client_side,
}


class Message(ApiModel):
    """One message of the conversation; of an assistant that called functions, the content may be left out."""

    refusable: ClassVar[Mapping[str, IsNeutral]] = _EMPTY_MESSAGE_FIELDS

    role: Role
    content: Content | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, message: object) -> object:
        if not isinstance(message, dict):
            return message
        for name, is_empty in _EMPTY_MESSAGE_FIELDS.items():
            if message.get(name) is not None and not is_empty(message[name]):
                raise UnsupportedParameter(f"messages: a message's {name!r} is not supported", param="messages")
        return {name: value for name, value in message.items() if name not in _EMPTY_MESSAGE_FIELDS}

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise InvalidRequest(f"messages: a message of role {self.role!r} needs content", param="messages")
        if self.tool_calls and self.role != "assistant":
            raise InvalidRequest("messages: tool_calls belong to messages of role 'assistant' only", param="messages")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise InvalidRequest(
                "messages: a message of role 'tool' needs the tool_call_id of the call that it answers, and no "
                "other message has one",
                param="messages",
            )
        return self

    def to_turn(self) -> Turn:
        """The message as chat templates know it, `system` for the role that OpenAI renamed to `developer`."""
        return Turn(
            role="system" if self.role == "developer" else self.role,
            content=content_text(self.content),
            name=self.name,
            calls=tuple(call.to_made_call() for call in self.tool_calls or ()),
            call_id=self.tool_call_id,
        )


def _check_results(messages: list[Message]) -> list[Message]:
    steps = (([call.id for call in message.tool_calls or ()], message.tool_call_id) for message in messages)
    check_results(steps, lambda index: f"messages.{index}.tool_call_id")
    return messages


Messages = Annotated[list[Message], Field(min_length=1), AfterValidator(_check_results)]
