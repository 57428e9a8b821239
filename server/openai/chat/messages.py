"""The messages of a conversation, in the forms in which clients send them, answers of other servers included."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cllm_core.errors import InvalidRequest
from cllm_core.text.tools.conversation import MadeCall, Turn

from ..shared.api_model import ANY_VALUE, ApiModel, Neutral, Refused, only
from ..shared.calls import CalledFunction, MessageToolCall
from ..shared.content import Content

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

# `developer` is OpenAI's later name of `system`; `function` its earlier one of `tool`.
_TEMPLATE_ROLES: Mapping[str, str] = {"developer": "system", "function": "tool"}


def _text_or_none(value: object) -> object:
    """Some servers have other things than text under these names."""
    return value if isinstance(value, str) else None


Thought = Annotated[str | None, BeforeValidator(_text_or_none)]


class Message(ApiModel):
    """One message of the conversation.

    Attributes:
        content: may be left out of an assistant's message, which may hold calls, a refusal or nothing at all.
        refusal: of an assistant, read where there is no content.
        reasoning_content, reasoning: what a model thought before this answer, by either name.
        function_call: one call, as deprecated clients have it.
    """

    path_prefix: ClassVar[str] = "messages."
    without_effect: ClassVar[Mapping[str, Neutral]] = {
        "annotations": ANY_VALUE,
        "parsed": ANY_VALUE,
        "finish_reason": ANY_VALUE,
        "reasoning_details": only(),
        "thinking_blocks": only(),
        "provider_specific_fields": only(),
        "cache_control": only(),
    }
    keeps_empty: ClassVar[frozenset[str]] = frozenset({"content"})  # a tool may have nothing to say
    refused: ClassVar[Mapping[str, Refused]] = {"audio": Refused("audio of earlier answers cannot be read", only())}

    role: Role
    content: Content | None = None
    refusal: str | None = None
    reasoning_content: Thought = None
    reasoning: Thought = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.content is None and self.role not in ("assistant", "tool", "function"):
            raise InvalidRequest(
                f"messages: a message of role {self.role!r} has no content; send some text", param="messages"
            )
        if (self.tool_calls or self.function_call) and self.role != "assistant":
            raise InvalidRequest(
                f"messages: a message of role {self.role!r} has tool_calls; only role 'assistant' makes calls",
                param="messages",
            )
        return self

    @property
    def num_chars(self) -> int:
        """About as many characters as the message has in a prompt."""
        called = sum(len(call.function.arguments) for call in self.tool_calls or ())
        return len(self.content or self.refusal or "") + len(self.thought or "") + called

    @property
    def thought(self) -> str | None:
        """What the model thought before, None where the message does not tell."""
        return self.reasoning_content or self.reasoning

    def to_turn(self) -> Turn:
        """The message as chat templates know it."""
        role = _TEMPLATE_ROLES.get(self.role, self.role)
        return Turn(
            role=role,
            content=self.content or self.refusal or "",
            name=self.name,
            calls=tuple(self._calls()),
            # Templates that know tools count on an id; a result without one may have lost its call.
            call_id=(self.tool_call_id or "") if role == "tool" else None,
            reasoning=self.thought if role == "assistant" else None,
        )

    def _calls(self) -> list[MadeCall]:
        calls = [call.to_made_call() for call in self.tool_calls or ()]
        if self.function_call is not None:
            calls.append(MessageToolCall(function=self.function_call).to_made_call())
        return calls


Messages = Annotated[list[Message], Field(min_length=1)]
