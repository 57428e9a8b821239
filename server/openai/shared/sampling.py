"""Fields of sampling and streaming, which the endpoints that generate share."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from cllm_core.errors import InvalidRequest
from cllm_core.request import SamplingDefaults, SamplingParams

from ...http.ignored import ignore_field
from .api_model import (
    MAX_COUNT,
    REQUEST_LABELS,
    SERVICE_FIELDS,
    ApiModel,
    Count,
    Integer,
    Neutral,
    NumLogprobs,
    Priority,
    TopK,
    only,
)

_MAX_TOKEN_ID_DIGITS = len(str(MAX_COUNT))  # int() refuses thousands of them with an error of its own

_UNLIMITED = _OFF = -1

# Of other servers: samplers that this one does not have, and switches for what it does anyway.
SAMPLER_FIELDS: Mapping[str, Neutral] = {
    "skip_special_tokens": only(True),
    "spaces_between_special_tokens": only(True),
    "include_stop_str_in_output": only(False),
    "truncate_prompt_tokens": only(-1),
    "use_beam_search": only(False),
    "length_penalty": only(1, 1.0),
    "early_stopping": only(False),
    "cache_prompt": only(True),
    "id_slot": only(-1),
    "n_probs": only(0),
    "samplers": only(),
    "mirostat": only(0),
    "mirostat_tau": only(),
    "mirostat_eta": only(),
    "typical_p": only(1, 1.0),
    "tfs_z": only(1, 1.0),
    "top_a": only(0, 0.0),
    "repeat_last_n": only(),
    "dynatemp_range": only(0, 0.0),
    "dynatemp_exponent": only(),
    "xtc_probability": only(0, 0.0),
    "xtc_threshold": only(),
    "dry_multiplier": only(0, 0.0),
    "dry_base": only(),
    "dry_allowed_length": only(),
    "dry_sequence_breakers": only(),
}


def capped(value: object) -> object:
    """A number too large to count with asks for as much as there is, as the highest one does."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return min(value, MAX_COUNT) if type(value) is int else value


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be at least 1, or -1 for as many tokens as fit the context")
    return value


TokenLimit = Annotated[int, Field(ge=_UNLIMITED), BeforeValidator(capped), AfterValidator(_not_zero)]
"""Most tokens of an output: cut to the context left behind the prompt; -1 takes all of it."""


def token_limit(*given: int | None) -> int | None:
    """The first limit that was given, None for the end of the context."""
    wanted = next((limit for limit in given if limit is not None), None)
    return None if wanted == _UNLIMITED else wanted


class StreamOptions(ApiModel):
    """What a stream holds beside the answer.

    Attributes:
        include_usage: end with a chunk that carries the usage and no choices.
        continuous_usage_stats: the same, and the usage so far in every chunk.
        include_decoding_stats: the same as include_usage, with how the call was decoded.
        include_draft: send with every step the text of the draft that is not accepted yet.
    """

    path_prefix: ClassVar[str] = "stream_options."
    # The server adds no padding against traffic analysis.
    without_effect: ClassVar[Mapping[str, Neutral]] = {"include_obfuscation": only(False)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_decoding_stats: bool | None = None
    include_draft: bool | None = None


def _check_stop(value: object) -> object:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return [text for text in value if text] or None
    raise InvalidRequest(f"stop={value!r:.80}: must be a string or a list of strings", param="stop")


def _check_logit_bias(value: object) -> object:
    if isinstance(value, dict):
        for token_id in value:
            if not _is_token_id(token_id):
                raise InvalidRequest(
                    f"logit_bias: {token_id!r:.80} is not a token id; use whole numbers as keys", param="logit_bias"
                )
    return value


def _is_token_id(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= _MAX_TOKEN_ID_DIGITS


class SamplingRequest(ApiModel):
    """Fields of sampling, which all endpoints that generate share; the last group are extensions of open servers.

    Attributes:
        user, safety_identifier: for whom the request is made; users take turns in the queue.
        repeat_penalty: as llama-server calls repetition_penalty.
        priority: lower goes before higher in the queue, where the server lets it.
    """

    without_effect: ClassVar[Mapping[str, Neutral]] = {**REQUEST_LABELS, **SERVICE_FIELDS, **SAMPLER_FIELDS}

    model: str | None = None
    user: JsonValue = None
    safety_identifier: JsonValue = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Integer | None = None
    stop: Annotated[
        str | list[str] | None, BeforeValidator(_check_stop, json_schema_input_type=str | list[str] | None)
    ] = None
    stream: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_check_logit_bias)] = None

    top_k: TopK | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    min_tokens: Integer | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Integer] | None = None
    block_length: Integer | None = None
    drafters: list[str] | None = None
    gated: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    priority: Priority | None = None

    def sampling_params(
        self,
        *,
        defaults: SamplingDefaults,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The engine's parameters (InvalidRequest if out of range).

        Args:
            defaults: of the model, for null or missing fields; where it sets none, the engine's are taken.
            max_tokens: output limit in tokens, None for the end of the context.
            logprobs: alternatives to report per token, None for no log-probabilities.
            prompt_logprobs: the same for the tokens of the prompt.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == _OFF else self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty,
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
            "drafters": None if self.drafters is None else tuple(self.drafters),
            "gated": self.gated,
        }
        own = {name: value for name, value in given.items() if value is not None}
        set_by_model = {name: value for name, value in defaults.values().items() if name != "max_tokens"}
        return SamplingParams(**{**set_by_model, **own})  # type: ignore[arg-type]


class GenerationRequest(SamplingRequest):
    """Fields that completions and chat completions share beside those of sampling.

    Attributes:
        n_predict: as llama-server calls max_tokens.
    """

    n: Count | None = None
    stream_options: StreamOptions | None = None

    n_predict: TokenLimit | None = None
    prompt_logprobs: NumLogprobs | None = None
    include_decoding_stats: bool | None = None
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _check_stream_fields(self) -> Self:
        if self.stream_options is not None and not self.stream:
            ignore_field("stream_options", reason="only a stream has options; set stream to true")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest(
                "prompt_logprobs: not available in a stream; leave prompt_logprobs or stream out",
                param="prompt_logprobs",
            )
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
    def options_of_stream(self) -> StreamOptions:
        """The options of the stream asked for; without one they have no effect."""
        return self.stream_options if self.stream and self.stream_options is not None else StreamOptions()

    @property
    def include_usage(self) -> bool:
        """Whether a stream shall end with the usage; whoever wants statistics wants the chunk that carries them."""
        return bool(self.options_of_stream.include_usage) or self.wants_continuous_usage or self.wants_decoding_stats

    @property
    def wants_continuous_usage(self) -> bool:
        """Whether every chunk of a stream shall carry the usage so far."""
        return bool(self.options_of_stream.continuous_usage_stats)

    @property
    def wants_draft(self) -> bool:
        """Whether a stream shall show the draft."""
        return bool(self.options_of_stream.include_draft)

    @property
    def wants_decoding_stats(self) -> bool:
        """Whether usage shall tell how the call was decoded."""
        return bool(self.options_of_stream.include_decoding_stats) or bool(self.include_decoding_stats)
