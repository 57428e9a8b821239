"""The body of a response request."""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from cllm_core.errors import InvalidRequest

from ...http.ignored import ignore_field
from ..chat.messages import Message
from ..chat.request import ChatCompletionRequest, ReasoningEffort, TemplateKwargs
from ..shared.api_model import (
    ANY_VALUE,
    EXAMPLE_MODEL,
    REQUEST_LABELS,
    ApiModel,
    Integer,
    Neutral,
    NumLogprobs,
    Refused,
    only,
)
from ..shared.sampling import SAMPLER_FIELDS, TokenLimit
from ..shared.structured import (
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedSchema,
    ResponseFormat,
    StructuredRequest,
    TextFormat,
)
from ..shared.tools import AllowedChoice, ChoiceMode, FunctionTool, NamedChoice, tool_use
from .input_items import Input
from .tools import ResponseToolChoice, ResponseTools

LOGPROBS = "message.output_text.logprobs"
"""Entry of `include` that asks for log-probabilities."""

# Entries about items that no answer here has.
_OTHER_INCLUDES = frozenset({
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "reasoning.encrypted_content", "web_search_call.action.sources",
    "web_search_call.results",
})  # fmt: skip


def _report_includes(names: list[str]) -> list[str]:
    for name in names:
        if name != LOGPROBS:
            ignore_field(name, prefix="include.", is_known=name in _OTHER_INCLUDES, reason="answers have no such part")
    return names


class ResponseStreamOptions(ApiModel):
    """How a stream is sent: without padding against traffic analysis, with the usage in its last event."""

    path_prefix: ClassVar[str] = "stream_options."
    without_effect: ClassVar[Mapping[str, Neutral]] = {"include_obfuscation": only(False), "include_usage": only(True)}


class SchemaTextFormat(NamedSchema):
    """JSON of a schema."""

    path_prefix: ClassVar[str] = "text.format."

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
    """How the model is to reason before it answers.

    Attributes:
        summary, generate_summary: of any value: give the reasoning as a summary, which is the whole of it.
    """

    path_prefix: ClassVar[str] = "reasoning."
    without_effect: ClassVar[Mapping[str, Neutral]] = {"context": only("auto"), "mode": only("standard")}

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseRequest(StructuredRequest):
    """Body of a response request; the last group are extensions of open servers."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": EXAMPLE_MODEL, "input": "Who was Jacobi?", "max_output_tokens": 8}]}
    )

    format_field: ClassVar[str] = "text.format"
    without_effect: ClassVar[Mapping[str, Neutral]] = {
        **{name: REQUEST_LABELS[name] for name in ("prompt_cache_options",)},
        **SAMPLER_FIELDS,
        "client_metadata": ANY_VALUE,
        "service_tier": only("auto", "default"),
        "truncation": only("disabled"),
    }
    refused: ClassVar[Mapping[str, Refused]] = {
        "background": Refused("this server answers while the client waits", only(False)),
        "conversation": Refused("this server keeps no conversations; continue by previous_response_id", only()),
        "prompt": Refused("this server keeps no prompt templates; send its text as instructions", only()),
        "n": Refused("there is one answer to a request", only(1)),
    }

    input: Input
    previous_response_id: str | None = None
    store: bool | None = None
    tools: ResponseTools | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Integer | None = None
    instructions: str | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: TokenLimit | None = None
    include: Annotated[list[str], AfterValidator(_report_includes)] | None = None
    top_logprobs: NumLogprobs | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    stream_options: ResponseStreamOptions | None = None

    chat_template_kwargs: TemplateKwargs | None = None
    enable_thinking: bool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        tool_use(self._chat_tools(), self._chat_choice(), is_parallel=True)
        if self.top_logprobs and not self.wants_logprobs:
            ignore_field("top_logprobs", reason=f"log-probabilities are wanted by include: [{LOGPROBS!r}]")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer shall have log-probabilities."""
        return LOGPROBS in (self.include or ())

    @property
    def summarizes(self) -> bool:
        """Whether reasoning shall be given as a summary."""
        options = self.reasoning
        return options is not None and (options.summary or options.generate_summary) is not None

    @property
    def wanted_format(self) -> ResponseFormat | None:
        """As StructuredRequest; InvalidRequest where it is demanded twice."""
        own = None if self.text is None else self.text.to_chat()
        if own is not None and self.response_format is not None:
            raise InvalidRequest(
                "response_format: text.format already sets the form of the output; leave one of them out",
                param="response_format",
            )
        return own or self.response_format

    def _chat_tools(self) -> list[FunctionTool]:
        return [tool.to_chat() for tool in self.tools or ()]

    def _chat_choice(self) -> ChoiceMode | NamedChoice | AllowedChoice | None:
        choice = self.tool_choice
        return choice if choice is None or isinstance(choice, str) else choice.to_chat()

    def to_chat(self, messages: Sequence[Message]) -> "ResponseAsChat":
        """The chat completion request that asks the same of this conversation."""
        shared = {name: getattr(self, name) for name in StructuredRequest.model_fields if name != "response_format"}
        return ResponseAsChat(
            **shared,
            response_format=self.wanted_format,
            messages=list(messages),
            tools=self._chat_tools(),
            tool_choice=self._chat_choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            enable_thinking=self.enable_thinking,
            chat_template_kwargs=self.chat_template_kwargs,
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.wants_logprobs,
            top_logprobs=self.top_logprobs if self.wants_logprobs else None,
        )


class ResponseAsChat(ChatCompletionRequest):
    """A response request in the words of chat completions; errors still use its own."""

    prompt_field: ClassVar[str] = "input"
    format_field: ClassVar[str] = "text.format"
