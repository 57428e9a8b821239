"""The body of a completion request."""

from typing import Annotated, Self

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from cllm_core.errors import InvalidRequest, UnsupportedParameter

from ..shared.api_model import EXAMPLE_MODEL, Count, NumLogprobs
from ..shared.sampling import GenerationRequest, capped, token_limit
from ..shared.structured import StructuredRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this endpoint only

Prompt = str | list[str] | list[int] | list[list[int]]


def _check_prompt(value: object) -> object:
    """Say in one sentence what pydantic would say in one for each form that a prompt may have."""
    if isinstance(value, str) or _is_list_of(value, str) or _is_list_of(value, int):
        return value
    if isinstance(value, list) and value and all(_is_list_of(part, int) for part in value):
        return value
    raise InvalidRequest(
        "prompt: must be a string, a list of strings, a list of token ids, or a list of such lists, none of them empty",
        param="prompt",
    )


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is kind for part in value)


class CompletionRequest(GenerationRequest, StructuredRequest):
    """Body of a completion request."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": EXAMPLE_MODEL, "prompt": "Jacobi was", "max_tokens": 8}]}
    )

    # Checked by the function alone: pydantic would try every form on every one of what may be a million token ids.
    prompt: Annotated[Prompt, PlainValidator(_check_prompt, json_schema_input_type=Prompt)]
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=-1), BeforeValidator(capped)] | None = None
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.num_candidates < self.num_choices:
            raise InvalidRequest(
                f"best_of={self.best_of}: must be at least n={self.num_choices}, the outputs to return", param="best_of"
            )
        if self.num_candidates > self.num_choices and self.stream:
            raise InvalidRequest(
                f"best_of={self.best_of}: the best output is known at the end only; leave stream out", param="best_of"
            )
        if self.suffix and not isinstance(self.prompts[0], str):
            raise UnsupportedParameter(
                "suffix: goes with a prompt of text only; send the prompt as text or leave suffix out", param="suffix"
            )
        if self.suffix and self.scores_prompt:
            raise UnsupportedParameter(
                "suffix: not supported together with echo and logprobs; leave one of the three out", param="suffix"
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "max_tokens=0: leaves nothing to answer but the prompt; set echo to true or max_tokens to at least 1",
                param="max_tokens",
            )
        return self

    @property
    def output_limit(self) -> int | None:
        """Output limit in tokens, None for the end of the context."""
        return token_limit(self.max_tokens, self.n_predict, DEFAULT_MAX_TOKENS)

    @property
    def num_candidates(self) -> int:
        """Outputs decoded for each prompt."""
        return self.num_choices if self.best_of is None else self.best_of

    @property
    def scores_prompt(self) -> bool:
        """Whether the answer repeats the prompt with log-probabilities."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list: texts, or token ids each."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt
