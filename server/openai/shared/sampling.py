"""Fields of sampling and streaming, which the endpoints that generate share."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from cllm_core.request import SamplingParams
from server.openai.shared.api_model import LABEL_FIELDS, MAX_COUNT, ApiModel, Count, IsNeutral, without_neutral

_MAX_TOKEN_ID_DIGITS = len(str(MAX_COUNT))  # int() refuses thousands of them with an error of its own


def _refuse_padding(value: bool) -> bool:
    if value:
        raise UnsupportedParameter(
            "stream_options: include_obfuscation is not supported, this server adds no padding; leave it out",
            param="stream_options.include_obfuscation",
        )
    return value


# No Literal[False]: that would take the number 0 too.
NoPadding = Annotated[bool, AfterValidator(_refuse_padding), Field(json_schema_extra={"const": False})]


class StreamOptions(ApiModel):
    """How a stream is told.

    Attributes:
        include_usage: end with a chunk that carries the usage and no choices.
        include_decoding_stats: the same, with how the call was decoded.
        include_draft: send with every step the text of the draft that is not accepted yet.
        include_obfuscation: false only; the server adds no padding against traffic analysis.
    """

    include_usage: bool | None = None
    include_decoding_stats: bool | None = None
    include_draft: bool | None = None
    include_obfuscation: NoPadding | None = None


def _check_stop(value: object) -> object:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value
    raise InvalidRequest("stop: must be a string or a list of strings", param="stop")


def _check_logit_bias(value: object) -> object:
    if isinstance(value, dict):
        for token_id in value:
            if not _is_token_id(token_id):
                raise InvalidRequest(f"logit_bias: {token_id!r} is not a token id", param="logit_bias")
    return value


def _is_token_id(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= _MAX_TOKEN_ID_DIGITS


class GenerationRequest(ApiModel):
    """Fields that completions and chat completions share; the last group are extensions of open servers."""

    refusable: ClassVar[Mapping[str, IsNeutral]] = LABEL_FIELDS

    model: str
    temperature: float | None = None
    top_p: float | None = None
    n: Count | None = None
    seed: int | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_check_stop)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_check_logit_bias)] = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    block_length: int | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    include_decoding_stats: bool | None = None
    return_token_ids: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: object) -> object:
        return without_neutral(body, cls.refusable)

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: only allowed with stream=true", param="stream_options")
        return self

    @property
    def num_choices(self) -> int:
        """Outputs for each prompt in the answer."""
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """Outputs decoded for each prompt; where they are more than the choices, the likeliest become these."""
        return self.num_choices

    @property
    def include_usage(self) -> bool:
        """Whether a stream shall end with the usage; whoever wants statistics wants the chunk that carries them."""
        asked = self.stream_options is not None and bool(self.stream_options.include_usage)
        return asked or self.wants_decoding_stats

    @property
    def wants_draft(self) -> bool:
        """Whether a stream shall show the draft."""
        return self.stream_options is not None and bool(self.stream_options.include_draft)

    @property
    def wants_decoding_stats(self) -> bool:
        """Whether usage shall tell how the call was decoded."""
        in_stream = self.stream_options is not None and bool(self.stream_options.include_decoding_stats)
        return in_stream or bool(self.include_decoding_stats)

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The engine's parameters; a null or missing field takes the engine's default (InvalidRequest if out of range).

        Args:
            max_tokens: output limit in tokens, None for the end of the context.
            logprobs: alternatives to report per token, None for no log-probabilities.
            prompt_logprobs: the same for the tokens of the prompt.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": None if self.logit_bias is None else {int(key): v for key, v in self.logit_bias.items()},
            "seed": self.seed,
            "max_tokens": max_tokens,
            "min_tokens": self.min_tokens,
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "stop": None if stop is None else tuple(stop),
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
            "block_length": self.block_length,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
