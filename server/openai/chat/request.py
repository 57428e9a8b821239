"""The body of a chat completion request."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, JsonValue, model_validator

from cllm_core.errors import InvalidRequest

from ..shared.api_model import EXAMPLE_MODEL, ApiModel, Neutral, NumLogprobs, Refused, only
from ..shared.content import Content
from ..shared.sampling import GenerationRequest, TokenLimit, token_limit
from ..shared.structured import StructuredRequest
from ..shared.tools import ToolChoice, Tools, ToolUse, tool_use
from .functions import FunctionCallChoice, Functions, functions_use
from .messages import Messages


class Prediction(ApiModel):
    """What the client expects most of the answer to be; it seeds the draft and changes no token."""

    path_prefix: ClassVar[str] = "prediction."

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


class ChatCompletionRequest(GenerationRequest, StructuredRequest):
    """Body of a chat completion request."""

    model_config = ConfigDict(json_schema_extra={"examples": _EXAMPLES})

    without_effect: ClassVar[Mapping[str, Neutral]] = {
        **GenerationRequest.without_effect,
        "verbosity": only("medium"),
    }
    refused: ClassVar[Mapping[str, Refused]] = {
        "modalities": Refused("this server answers in text only", only(["text"])),
        "audio": Refused("this server answers in text only", only()),
        "web_search_options": Refused("this server cannot search the web", only()),
        "moderation": Refused("this server has no moderation", only()),
    }

    prompt_field: ClassVar[str] = "messages"

    messages: Messages
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: FunctionCallChoice | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    prediction: Prediction | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: ReasoningEffort | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        self.tool_use()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                f"top_logprobs={self.top_logprobs}: needs logprobs; set it to true", param="top_logprobs"
            )
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                f"max_tokens={self.max_tokens}: max_completion_tokens={self.max_completion_tokens} sets another limit; "
                "leave one of them out",
                param="max_tokens",
            )
        if self.continue_final_message:
            self._check_continued()
        return self

    def _check_continued(self) -> None:
        if self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message: a message cannot be continued behind a new one; set add_generation_prompt to "
                "false",
                param="continue_final_message",
            )
        last = self.messages[-1]
        if not last.content or last.tool_calls or last.function_call:
            raise InvalidRequest(
                "continue_final_message: the last message has no text to continue; leave continue_final_message out",
                param="continue_final_message",
            )

    def tool_use(self) -> ToolUse | None:
        """Which calls of functions the request wants, None for none (InvalidRequest where its fields do not agree)."""
        if self.calls_by_functions:
            return functions_use(self.functions, self.function_call)
        return tool_use(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls is not False)

    @property
    def calls_by_functions(self) -> bool:
        """Whether the request uses the deprecated fields, and expects the deprecated form of calls in the answer."""
        return self.tools is None and self.functions is not None

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends with what opens the assistant's turn."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    @property
    def continued_text(self) -> str | None:
        """The text that the answer goes on with, None where it is a message of its own."""
        return self.messages[-1].content if self.continue_final_message else None

    def output_limit(self, default: int | None) -> int | None:
        """Output limit in tokens, the default where the request names none; None for the end of the context."""
        return token_limit(self.max_completion_tokens, self.max_tokens, self.n_predict, default)

    @property
    def num_alternatives(self) -> int | None:
        """Alternatives to report per token, None where no log-probabilities are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None
