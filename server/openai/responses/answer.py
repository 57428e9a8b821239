"""The answer's body, and the items of inputs as they are shown again."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from ..chat.answer import ChosenTokenLogprob
from ..shared.tools import ChoiceMode

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class Shown(BaseModel):
    """A body or part of one, of which every field is sent, those that keep their default too."""

    model_config = ConfigDict(serialize_by_alias=True)

    def model_post_init(self, _: object) -> None:
        """Count every field as set."""
        self.model_fields_set.update(type(self).model_fields)


class OutputText(Shown):
    """A part of an answer's message; the only one."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[dict[str, JsonValue]]
    logprobs: list[ChosenTokenLogprob]


class OutputMessage(Shown):
    """The text of the answer."""

    type: Literal["message"] = "message"
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningText(Shown):
    """What the model thought."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class SummaryText(Shown):
    """What the model thought, for clients that show summaries."""

    type: Literal["summary_text"] = "summary_text"
    text: str


class ReasoningItem(Shown):
    """What the model thought before it answered; either as content or as summary."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    status: ItemStatus
    summary: list[SummaryText]
    content: list[ReasoningText] | None
    encrypted_content: None


class FunctionCallItem(Shown):
    """A call of a function; arguments are the text of a JSON object, incomplete where the answer was cut.

    Attributes:
        call_id: that the result of the call has to name.
    """

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class InputTextPart(Shown):
    """The text of an input's message."""

    type: Literal["input_text"] = "input_text"
    text: str


class InputMessageItem(Shown):
    """A message of an input, not of the assistant."""

    type: Literal["message"] = "message"
    id: str
    status: ItemStatus
    role: Literal["system", "developer", "user"]
    content: list[InputTextPart]


class FunctionOutputItem(Shown):
    """The result of a call."""

    type: Literal["function_call_output"] = "function_call_output"
    id: str
    status: ItemStatus
    call_id: str
    output: str


ListedItem = InputMessageItem | FunctionOutputItem | OutputItem


class ItemList(Shown):
    """Items of a stored response's input.

    Attributes:
        has_more: there are more behind the last one.
    """

    object: Literal["list"] = "list"
    data: list[ListedItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(Shown):
    """A response that is not stored any more."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ToolBody(Shown):
    """A tool, as the request offered it."""

    type: Literal["function"] = "function"
    name: str
    description: str | None
    parameters: dict[str, JsonValue] | None
    strict: bool | None


class NamedChoiceBody(Shown):
    """The choice of one tool, as the request made it."""

    type: Literal["function"] = "function"
    name: str


class AllowedChoiceBody(Shown):
    """The choice of some tools, as the request made it."""

    type: Literal["allowed_tools"] = "allowed_tools"
    mode: Literal["auto", "required"]
    tools: list[NamedChoiceBody]


class PlainFormatBody(Shown):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormatBody(Shown):
    """JSON of a schema, as the request demanded it."""

    type: Literal["json_schema"] = "json_schema"
    name: str
    description: str | None
    schema_: dict[str, JsonValue] = Field(serialization_alias="schema")
    strict: bool | None


class TextBody(Shown):
    """The form of the answer's text."""

    format: PlainFormatBody | SchemaFormatBody
    verbosity: Literal["medium"] = "medium"


class ReasoningBody(Shown):
    """How the model was to reason, as the request said."""

    effort: str | None
    summary: str | None


class InputTokensDetails(Shown):
    """What of the input tokens is special.

    Attributes:
        cached_tokens: those whose cache entries were shared with an earlier request.
        cache_write_tokens: of OpenAI's paid writes, which there are none of here.
    """

    cached_tokens: int
    cache_write_tokens: Literal[0] = 0


class OutputTokensDetails(Shown):
    """What of the output tokens is special."""

    reasoning_tokens: int


class ResponseUsage(Shown):
    """Tokens of the call."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Shown):
    """Why the answer is cut."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(Shown):
    """Why there is no answer."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class ResponseBody(Shown):
    """Answer to a response request, whole or (in a stream's events) as far as it is.

    Fields of OpenAI's that say nothing here are null.

    Attributes:
        store: whether it can be asked for again, and continued.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: Status
    background: Literal[False] = False
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    reasoning: ReasoningBody
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: TextBody
    tool_choice: ChoiceMode | NamedChoiceBody | AllowedChoiceBody
    tools: list[ToolBody]
    top_logprobs: int
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None
    user: str | None
    access_programs: None = None
    conversation: None = None
    image: None = None
    input_transformations: None = None
    moderation: None = None
    prompt: None = None
    prompt_cache_diagnostics: None = None
    prompt_cache_options: None = None
    tool_usage: None = None
