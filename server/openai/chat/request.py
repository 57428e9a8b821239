"""The body of a chat completion request."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from cllm_core.request import MAX_LOGPROBS
from server.openai.chat.messages import Content, Messages
from server.openai.shared.api_model import EXAMPLE_MODEL, LABEL_FIELDS, ApiModel, Count, IsNeutral, only
from server.openai.shared.structured import StructuredRequest
from server.openai.shared.tools import ToolChoice, Tools, ToolUse, tool_use


class Prediction(ApiModel):
    """What the client expects most of the answer to be; it seeds the draft and changes no token."""

    type: Literal["content"]
    content: Content


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
"""How much a model is to reason before it answers."""

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
    reasoning_effort: ReasoningEffort | None = None
    enable_thinking: bool | None = None

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
