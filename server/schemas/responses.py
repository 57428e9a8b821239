"""Bodies of /v1/responses: text in, text out, nothing stored."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from server.schemas.chat import ChatCompletionRequest, Message
from server.schemas.common import EXAMPLE_MODEL, LABEL_FIELDS, ApiModel, IsNeutral, NoPadding, only, without_neutral

_TEXT_PARTS = ("input_text", "output_text", "text")

# Fields of an output item that clients send back with the next input.
_ITEM_LABELS = frozenset({"id", "status"})


def _check_input(value: object) -> object:
    """Turn what the client sends into messages, naming the item or part that is not served."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InvalidRequest("input: must be a string or a list of messages, not empty", param="input")
    return [_message_of(item) for item in value]


def _message_of(item: object) -> object:
    if not isinstance(item, dict):
        raise InvalidRequest("input: an item must be an object", param="input")
    kind = item.get("type", "message")
    if kind != "message":
        raise UnsupportedParameter(f"input item of type {kind!r}: only type 'message' is supported", param="input")
    message = {name: value for name, value in item.items() if name not in _ITEM_LABELS | {"type"}}
    return message | {"content": _text_of(item.get("content"))}


def _text_of(content: object) -> object:
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise UnsupportedParameter(f"input: content part of type {kind!r}: only text is supported", param="input")
    return "".join(part["text"] for part in content)


class InputMessage(ApiModel):
    """One message of the conversation so far."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


Input = str | list[InputMessage]


class ResponseStreamOptions(ApiModel):
    """How a stream is told: without padding against traffic analysis."""

    include_obfuscation: NoPadding | None = None


class ResponseRequest(ApiModel):
    """Body of a response request; the last group are extensions of open servers."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": EXAMPLE_MODEL, "input": "Who was Jacobi?", "max_output_tokens": 8}]}
    )

    refusable: ClassVar[Mapping[str, IsNeutral]] = {
        **{name: is_neutral for name, is_neutral in LABEL_FIELDS.items() if name != "metadata"},
        "background": only(False),
        "include": only([]),
        "tools": only([]),
        "tool_choice": only("none", "auto"),
        "parallel_tool_calls": only(True, False),
        "text": only({}, {"format": {"type": "text"}}),
        "top_logprobs": only(0),
        "truncation": only("disabled"),
        "reasoning": only({}),
        "previous_response_id": only(),
        "conversation": only(),
        "prompt": only(),
        "max_tool_calls": only(),
        "prompt_cache_retention": only("in_memory"),
    }

    model: str
    input: Annotated[list[InputMessage], BeforeValidator(_check_input, json_schema_input_type=Input)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    metadata: dict[str, str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    block_length: int | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: object) -> object:
        return without_neutral(body, cls.refusable)

    def to_chat(self) -> "ResponseAsChat":
        """The chat completion request that asks the same (InvalidRequest where a value is out of range)."""
        messages = [Message(role=turn.role, content=turn.content) for turn in self.input]
        if self.instructions is not None:
            messages.insert(0, Message(role="developer", content=self.instructions))
        return ResponseAsChat(
            model=self.model,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            block_length=self.block_length,
            cache_salt=self.cache_salt,
        )


class ResponseAsChat(ChatCompletionRequest):
    """A response request in the words of chat completions; errors still use its own."""

    prompt_field: ClassVar[str] = "input"

    @property
    def limit_field(self) -> str:
        """The field that limits the output."""
        return "max_output_tokens"


class OutputText(BaseModel):
    """A part of the answer; the only one."""

    type: Literal["output_text"]
    text: str
    annotations: list[str]
    logprobs: list[str]


class OutputMessage(BaseModel):
    """The answer."""

    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class InputTokensDetails(BaseModel):
    """Input tokens whose cache entries were shared with an earlier request."""

    cached_tokens: int


class OutputTokensDetails(BaseModel):
    """This server has no models that reason apart from their answer."""

    reasoning_tokens: Literal[0]


class ResponseUsage(BaseModel):
    """Tokens of the call."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why the answer is cut."""

    reason: Literal["max_output_tokens"]


class ResponseBody(BaseModel):
    """Answer to a response request, whole or (in a stream's events) as far as it is."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    tool_choice: Literal["none"]
    tools: list[str]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class ResponseEvent(BaseModel):
    """One event of a stream; sequence_number counts them from 0."""

    type: str
    sequence_number: int


class StatusEvent(ResponseEvent):
    """The response began or ended."""

    response: ResponseBody


class ItemEvent(ResponseEvent):
    """The answer began or ended."""

    output_index: Literal[0]
    item: OutputMessage


class InPartEvent(ResponseEvent):
    """Something happened in the answer's only part."""

    item_id: str
    output_index: Literal[0]
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


RESPONSE_EVENTS = (StatusEvent, ItemEvent, PartEvent, TextDeltaEvent, TextDoneEvent, ErrorEvent)
"""Every event that a stream may hold."""
