"""The body of a response request: text and calls of functions, nothing stored."""

from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    WrapValidator,
    model_validator,
)

from server.openai.chat.messages import Message
from server.openai.chat.request import ChatCompletionRequest, ReasoningEffort
from server.openai.responses.input_items import Input, InputCall, InputItem, InputMessage, InputResult
from server.openai.shared.api_model import (
    EXAMPLE_MODEL,
    REQUEST_LABELS,
    SERVICE_FIELDS,
    ApiModel,
    Integer,
    Neutral,
    Refused,
    TopK,
    only,
)
from server.openai.shared.sampling import TokenLimit
from server.openai.shared.structured import JsonObjectFormat, JsonSchemaFormat, NamedSchema, ResponseFormat, TextFormat
from server.openai.shared.tools import (
    AllowedChoice,
    AllowedTools,
    ChoiceMode,
    FunctionDefinition,
    FunctionName,
    FunctionTool,
    NamedChoice,
    NamedFunction,
    OtherTool,
    choice_parser,
    skip_other_tools,
    tool_use,
)


class ResponseTool(FunctionDefinition):
    """A tool of type function, the only type served."""

    type: Literal["function"]

    def to_chat(self) -> FunctionTool:
        """The tool in the words of chat completions."""
        definition = FunctionDefinition(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return FunctionTool(type="function", function=definition)


ResponseTools = Annotated[
    list[ResponseTool], BeforeValidator(skip_other_tools, json_schema_input_type=list[ResponseTool | OtherTool])
]


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

    path_prefix: ClassVar[str] = "stream_options."
    without_effect: ClassVar[Mapping[str, Neutral]] = {"include_obfuscation": only(False)}


class SchemaTextFormat(NamedSchema):
    """JSON of a schema."""

    type: Literal["json_schema"]


TextOutputFormat = Annotated[TextFormat | JsonObjectFormat | SchemaTextFormat, Field(discriminator="type")]


class TextOptions(ApiModel):
    """The form of the answer's text."""

    path_prefix: ClassVar[str] = "text."
    without_effect: ClassVar[Mapping[str, Neutral]] = {"verbosity": only("medium")}

    format: TextOutputFormat | None = None

    def to_chat(self) -> ResponseFormat | None:
        """The response_format of chat completions that asks the same."""
        if not isinstance(self.format, SchemaTextFormat):
            return self.format
        named = NamedSchema(name=self.format.name, schema=self.format.schema_, strict=self.format.strict)
        return JsonSchemaFormat(type="json_schema", json_schema=named)


class ReasoningOptions(ApiModel):
    """How much the model is to reason before it answers."""

    path_prefix: ClassVar[str] = "reasoning."
    without_effect: ClassVar[Mapping[str, Neutral]] = {"summary": only(), "generate_summary": only()}

    effort: ReasoningEffort | None = None


class ResponseRequest(ApiModel):
    """Body of a response request; the last group are extensions of open servers."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": EXAMPLE_MODEL, "input": "Who was Jacobi?", "max_output_tokens": 8}]}
    )

    without_effect: ClassVar[Mapping[str, Neutral]] = {
        **{name: neutral for name, neutral in REQUEST_LABELS.items() if name != "metadata"},
        **SERVICE_FIELDS,
        "include": only(),
        "truncation": only("disabled"),
        "max_tool_calls": only(),
    }
    refused: ClassVar[Mapping[str, Refused]] = {
        "background": Refused("this server answers while the client waits", only(False)),
        "top_logprobs": Refused("responses have no log-probabilities here", only(0)),
        "previous_response_id": Refused("this server stores no responses", only()),
        "conversation": Refused("this server stores no conversations", only()),
        "prompt": Refused("this server stores no prompts", only()),
    }

    model: str | None = None
    input: Input
    tools: ResponseTools | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    instructions: str | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: TokenLimit | None = None
    metadata: dict[str, str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None

    top_k: TopK | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: Integer | None = None
    block_length: Integer | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

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
        return ResponseAsChat(
            model=self.model,
            messages=_with_instructions(self.instructions, _to_messages(self.input)),
            tools=self._chat_tools(),
            tool_choice=self._chat_choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=None if self.text is None else self.text.to_chat(),
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
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


def _with_instructions(instructions: str | None, messages: list[Message]) -> list[Message]:
    """The conversation with one system message at its beginning: many chat templates allow no more."""
    leading = list(takewhile(lambda message: message.role in ("system", "developer"), messages))
    texts = [] if instructions is None else [instructions]
    texts += [message.content or "" for message in leading]
    if not texts:
        return messages
    return [Message(role="developer", content="\n\n".join(texts)), *messages[len(leading) :]]


class ResponseAsChat(ChatCompletionRequest):
    """A response request in the words of chat completions; errors still use its own."""

    prompt_field: ClassVar[str] = "input"
    format_field: ClassVar[str] = "text.format"
