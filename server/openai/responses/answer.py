"""The answer's body."""

from typing import Literal

from pydantic import (
    BaseModel,
    JsonValue,
)

from server.openai.shared.tools import ChoiceMode


class OutputText(BaseModel):
    """A part of a message; the only one."""

    type: Literal["output_text"]
    text: str
    annotations: list[str]
    logprobs: list[str]


class OutputMessage(BaseModel):
    """The text of the answer."""

    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCallItem(BaseModel):
    """A call of a function; arguments are the text of a JSON object, incomplete where the answer was cut.

    Attributes:
        call_id: that the result of the call has to name.
    """

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


OutputItem = OutputMessage | FunctionCallItem


class ToolBody(BaseModel):
    """A tool, as the request offered it."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, JsonValue] | None
    strict: bool | None


class NamedChoiceBody(BaseModel):
    """The choice of one tool, as the request made it."""

    type: Literal["function"]
    name: str


class AllowedChoiceBody(BaseModel):
    """The choice of some tools, as the request made it."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedChoiceBody]


class InputTokensDetails(BaseModel):
    """What of the input tokens is special.

    Attributes:
        cached_tokens: those whose cache entries were shared with an earlier request.
        cache_write_tokens: of OpenAI's paid writes, which there are none of here.
    """

    cached_tokens: int
    cache_write_tokens: Literal[0]


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
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    tool_choice: ChoiceMode | NamedChoiceBody | AllowedChoiceBody
    tools: list[ToolBody]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
