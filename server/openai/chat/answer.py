"""The answer's body, whole and in chunks."""

from typing import Literal

from pydantic import BaseModel

from ..shared.prompt_logprobs import PromptLogprobs
from ..shared.usage import Usage


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
    """The model's answer; content is null where it only calls functions, tool_calls are there where it calls any.

    Attributes:
        reasoning_content: what a model that reasons thought before; left out where there is none.
        function_call: in place of tool_calls, for requests with the deprecated `functions`.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallBody] | None = None
    function_call: CalledFunctionBody | None = None


ChatFinishReason = Literal["stop", "length", "tool_calls", "function_call"]


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
    """Answer to a chat completion request; prompt_token_ids and prompt_logprobs are extensions, on request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


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
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionDelta | None = None


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
