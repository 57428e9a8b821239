"""Bodies of /v1/chat/completions."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from cllm_core.request import MAX_LOGPROBS
from cllm_core.text.tools.conversation import Turn
from server.openai.shared.fields import (
    EXAMPLE_MODEL,
    LABEL_FIELDS,
    ApiModel,
    Count,
    IsNeutral,
    Usage,
    client_side,
    only,
)
from server.openai.shared.structured import StructuredRequest
from server.openai.shared.tools import MessageToolCall, ToolChoice, Tools, ToolUse, check_results, tool_use

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
    """The text of a content field, its parts put together."""
    if isinstance(content, list):
        return "".join(part.text for part in content)
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


class Prediction(ApiModel):
    """What the client expects most of the answer to be; it seeds the draft and changes no token."""

    type: Literal["content"]
    content: Content


TemplateKwargs = dict[str, JsonValue]
"""Variables for the chat template; bounded as a whole by the server's limits."""


_QUESTION: dict[str, JsonValue] = {
    "model": EXAMPLE_MODEL,
    "messages": [{"role": "user", "content": "Who was Jacobi?"}],
    "max_tokens": 64,
}
_PERSON: dict[str, JsonValue] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "born": {"type": "integer"}},
    "required": ["name", "born"],
    "additionalProperties": False,
}
_EXAMPLES: list[JsonValue] = [
    _QUESTION,
    {
        **_QUESTION,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": _PERSON, "strict": True},
        },
    },
    {
        **_QUESTION,
        "tools": [{"type": "function", "function": {"name": "look_up", "parameters": _PERSON}}],
        "tool_choice": "auto",
    },
]


class ChatCompletionRequest(StructuredRequest):
    """Body of a chat completion request."""

    model_config = ConfigDict(json_schema_extra={"examples": _EXAMPLES})

    refusable: ClassVar[Mapping[str, IsNeutral]] = {
        **LABEL_FIELDS,
        "functions": only([]),
        "function_call": only("none", "auto"),
        "modalities": only(["text"]),
        "verbosity": only("medium"),
        "reasoning_effort": only("none"),
        "audio": only(),
        "web_search_options": only(),
        "moderation": only(),
        "prompt_cache_options": only(),
        "prompt_cache_retention": only("in_memory"),
    }

    prompt_field: ClassVar[str] = "messages"

    messages: Messages
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    prediction: Prediction | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_successors(cls, body: object) -> object:
        successors = {"functions": "tools", "function_call": "tool_choice"}
        for name, successor in successors.items():
            if isinstance(body, dict) and body.get(name) is not None and not cls.refusable[name](body[name]):
                raise UnsupportedParameter(f"{name}: deprecated by OpenAI, use {successor!r} instead", param=name)
        return body

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        self.tool_use()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs: only allowed with logprobs=true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                "max_tokens: give either max_tokens or max_completion_tokens, not two different values",
                param="max_tokens",
            )
        return self

    def tool_use(self) -> ToolUse | None:
        """Which calls of functions the request wants, None for none (InvalidRequest where its fields do not agree)."""
        return tool_use(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls is not False)

    @property
    def limit_field(self) -> str:
        """The field that limits the output."""
        return "max_completion_tokens" if self.max_tokens is None else "max_tokens"

    @property
    def output_limit(self) -> int | None:
        """Output limit in tokens, None for the end of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_alternatives(self) -> int | None:
        """Alternatives to report per token, None where no log-probabilities are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenLogprob(BaseModel):
    """A token, its UTF-8 bytes and its log-probability."""

    token: str
    bytes: list[int]
    logprob: float


class ChosenTokenLogprob(TokenLogprob):
    """A token of the answer with the likeliest alternatives at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the answer's tokens."""

    content: list[ChosenTokenLogprob]
    refusal: None = None


class CalledFunctionBody(BaseModel):
    """A function that the model calls; arguments are the text of a JSON object, incomplete where the answer was cut."""

    name: str
    arguments: str


class ToolCallBody(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunctionBody


class AnswerMessage(BaseModel):
    """The model's answer; content is null where it only calls functions, tool_calls are there where it calls any."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallBody] | None = None


ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One whole answer.

    Attributes:
        token_ids: of the answer, its end-of-sequence token included (extension, on request).
    """

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """Answer to a chat completion request; prompt_token_ids is an extension, on request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class FunctionDelta(BaseModel):
    """The name of a function with empty arguments, or the next piece of the arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """What is new of a call; its first delta has id, type and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """What is new of an answer; the first delta names the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    """What is new of one choice.

    Attributes:
        draft: text that may follow what was given so far, replacing the draft before (extension, on request).
        token_ids: accepted in this step (extension, on request).
    """

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    draft: str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """One chunk of a streamed answer; prompt_token_ids comes with a choice's first chunk (extension, on request)."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
