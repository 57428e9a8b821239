"""Bodies of /v1/responses: text and calls of functions, nothing stored."""

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    WrapValidator,
    model_validator,
)

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from server.openai.chat.body import ChatCompletionRequest, Message
from server.openai.shared.fields import (
    EXAMPLE_MODEL,
    LABEL_FIELDS,
    ApiModel,
    Count,
    IsNeutral,
    NoPadding,
    only,
    without_neutral,
)
from server.openai.shared.structured import JsonObjectFormat, JsonSchemaFormat, NamedSchema, ResponseFormat, TextFormat
from server.openai.shared.tools import (
    AllowedChoice,
    AllowedTools,
    Arguments,
    CalledFunction,
    ChoiceMode,
    FunctionDefinition,
    FunctionName,
    FunctionTool,
    MessageToolCall,
    NamedChoice,
    NamedFunction,
    check_results,
    choice_parser,
    parse_by_type,
    refuse_other_tools,
    tool_use,
)

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
    return "".join(part["text"] for part in content)


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


class ResponseTool(FunctionDefinition):
    """A tool of type function, the only type served."""

    type: Literal["function"]

    def to_chat(self) -> FunctionTool:
        """The tool in the words of chat completions."""
        definition = FunctionDefinition(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return FunctionTool(type="function", function=definition)


class ResponseNamedChoice(ApiModel):
    """One of the tools offered."""

    type: Literal["function"]
    name: FunctionName

    def to_chat(self) -> NamedChoice:
        """The choice in the words of chat completions."""
        return NamedChoice(type="function", function=NamedFunction(name=self.name))


class ResponseAllowedChoice(ApiModel):
    """Some of the tools offered; with mode "required" one has to be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseNamedChoice], Field(min_length=1)]

    def to_chat(self) -> AllowedChoice:
        """The choice in the words of chat completions."""
        allowed = AllowedTools(mode=self.mode, tools=[tool.to_chat() for tool in self.tools])
        return AllowedChoice(type="allowed_tools", allowed_tools=allowed)


ResponseToolChoice = Annotated[
    ChoiceMode | ResponseNamedChoice | ResponseAllowedChoice,
    WrapValidator(choice_parser({"function": ResponseNamedChoice, "allowed_tools": ResponseAllowedChoice})),
]


class ResponseStreamOptions(ApiModel):
    """How a stream is told: without padding against traffic analysis."""

    include_obfuscation: NoPadding | None = None


class SchemaTextFormat(NamedSchema):
    """JSON of a schema."""

    type: Literal["json_schema"]


TextOutputFormat = Annotated[TextFormat | JsonObjectFormat | SchemaTextFormat, Field(discriminator="type")]


class TextOptions(ApiModel):
    """The form of the answer's text."""

    refusable: ClassVar[Mapping[str, IsNeutral]] = {"verbosity": only("medium")}

    format: TextOutputFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: object) -> object:
        return without_neutral(body, cls.refusable, prefix="text.")

    def to_chat(self) -> ResponseFormat | None:
        """The response_format of chat completions that asks the same."""
        if not isinstance(self.format, SchemaTextFormat):
            return self.format
        named = NamedSchema(name=self.format.name, schema=self.format.schema_, strict=self.format.strict)
        return JsonSchemaFormat(type="json_schema", json_schema=named)


class ResponseRequest(ApiModel):
    """Body of a response request; the last group are extensions of open servers."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": EXAMPLE_MODEL, "input": "Who was Jacobi?", "max_output_tokens": 8}]}
    )

    refusable: ClassVar[Mapping[str, IsNeutral]] = {
        **{name: is_neutral for name, is_neutral in LABEL_FIELDS.items() if name != "metadata"},
        "background": only(False),
        "include": only([]),
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
    input: Input
    tools: Annotated[list[ResponseTool], BeforeValidator(refuse_other_tools)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    instructions: str | None = None
    text: TextOptions | None = None
    max_output_tokens: Count | None = None
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

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        tool_use(self._chat_tools(), self._chat_choice(), is_parallel=True)
        return self

    def _chat_tools(self) -> list[FunctionTool]:
        return [tool.to_chat() for tool in self.tools or ()]

    def _chat_choice(self) -> ChoiceMode | NamedChoice | AllowedChoice | None:
        choice = self.tool_choice
        return choice if choice is None or isinstance(choice, str) else choice.to_chat()

    def to_chat(self) -> "ResponseAsChat":
        """The chat completion request that asks the same (InvalidRequest where a value is out of range)."""
        messages = _to_messages(self.input)
        if self.instructions is not None:
            messages.insert(0, Message(role="developer", content=self.instructions))
        return ResponseAsChat(
            model=self.model,
            messages=messages,
            tools=self._chat_tools(),
            tool_choice=self._chat_choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=None if self.text is None else self.text.to_chat(),
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


def _to_messages(items: Iterable[InputItem]) -> list[Message]:
    """Chat messages; a call is part of the assistant's message before it, where there is one."""
    messages: list[Message] = []
    for item in items:
        match item:
            case InputMessage():
                messages.append(Message(role=item.role, content=item.content))
            case InputResult():
                messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
            case InputCall():
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message(role="assistant", content="", tool_calls=[]))
                calls = [*(messages[-1].tool_calls or ()), item.to_chat()]
                messages[-1] = messages[-1].model_copy(update={"tool_calls": calls})
    return messages


class ResponseAsChat(ChatCompletionRequest):
    """A response request in the words of chat completions; errors still use its own."""

    prompt_field: ClassVar[str] = "input"
    format_field: ClassVar[str] = "text.format"

    @property
    def limit_field(self) -> str:
        """The field that limits the output."""
        return "max_output_tokens"


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


class ResponseEvent(BaseModel):
    """One event of a stream; sequence_number counts them from 0."""

    type: str
    sequence_number: int


class StatusEvent(ResponseEvent):
    """The response began or ended."""

    response: ResponseBody


class ItemEvent(ResponseEvent):
    """An item of the answer began or ended."""

    output_index: int
    item: OutputItem


class InItemEvent(ResponseEvent):
    """Something happened in an item."""

    item_id: str
    output_index: int


class ArgumentsDeltaEvent(InItemEvent):
    """A piece of a call's arguments."""

    delta: str


class ArgumentsDoneEvent(InItemEvent):
    """The whole arguments of a call."""

    arguments: str


class InPartEvent(InItemEvent):
    """Something happened in a message's only part."""

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


RESPONSE_EVENTS = (
    StatusEvent,
    ItemEvent,
    PartEvent,
    TextDeltaEvent,
    TextDoneEvent,
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ErrorEvent,
)
"""Every event that a stream may hold."""
