"""What the request bodies of the completion endpoints share: strict parsing, sampling fields, refusals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from cllm_core.request import BOUNDS, Bounds, SamplingParams

EXAMPLE_MODEL = "cllm-chat"
"""Model of the examples in the OpenAPI document: the embedded one."""

# Sums and products of longer numbers have more digits than Python writes into a message.
MAX_COUNT = 2**31
"""Highest number of tokens or outputs that a field may ask for; the server's own limits are lower."""

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]

_MAX_TOKEN_ID_DIGITS = len(str(MAX_COUNT))  # int() refuses thousands of them with an error of its own


@dataclass(frozen=True, slots=True)
class IsNeutral:
    """Tells whether a value of a field asks for nothing; `schema` says the same as a JSON schema."""

    accepts: Callable[[object], bool]
    schema: JsonSchemaValue

    def __call__(self, value: object) -> bool:
        """Whether it does."""
        return self.accepts(value)


def only(*values: object) -> IsNeutral:
    """Accept exactly these values: the documented defaults, which ask for nothing."""
    # Compared with the type, for 1 == True would let a number through where a switch is meant.
    return IsNeutral(
        lambda value: any(type(value) is type(accepted) and value == accepted for accepted in values),
        {"enum": list(values)} if values else {"type": "null"},
    )


# Documented to label the request and to change nothing.
metadata_text = IsNeutral(lambda value: isinstance(value, str), {"type": "string"})
metadata_map = IsNeutral(
    lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    {"type": "object", "additionalProperties": {"type": "string"}},
)

# What the official client's parsing helpers put into an answer for their user, and send back with it.
client_side = IsNeutral(lambda _: True, {})


class ApiModel(BaseModel):
    """A body or part of one: unknown fields and wrong types are refused, never converted or dropped.

    Attributes:
        refusable: known fields that are no fields of the model, for they may only have values that ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())

    refusable: ClassVar[Mapping[str, IsNeutral]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Publish what validators check beyond the types: fields of `refusable`, bounds of sampling parameters."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name, is_neutral in cls.refusable.items():
            properties[name] = {"anyOf": [is_neutral.schema, {"type": "null"}]}
        for name in properties.keys() & BOUNDS.keys():
            _publish_bounds(properties[name], BOUNDS[name])
        return schema


def _publish_bounds(field: JsonSchemaValue, bounds: Bounds) -> None:
    for form in field.get("anyOf", ()):
        if form.get("type") in ("number", "integer"):
            form.setdefault("exclusiveMinimum" if bounds.above_low else "minimum", bounds.low)
            form.setdefault("maximum", bounds.high)


# Fields of OpenAI's API that need no work here, for the values under which they change nothing.
LABEL_FIELDS: Mapping[str, IsNeutral] = {
    "user": metadata_text,
    "safety_identifier": metadata_text,
    "prompt_cache_key": metadata_text,
    "metadata": metadata_map,
    "store": only(False),
    "service_tier": only("auto", "default"),
}


def without_neutral(body: object, refusable: Mapping[str, IsNeutral], *, prefix: str = "") -> object:
    """The body without the known fields that ask for nothing; UnsupportedParameter where one asks for something.

    Args:
        prefix: of the fields' names in the error: the place of `body` in the request.
    """
    if not isinstance(body, dict):
        return body
    for name, is_neutral in refusable.items():
        if body.get(name) is not None and not is_neutral(body[name]):
            field = prefix + name
            raise UnsupportedParameter(f"{field}: this server does not support the value given", param=field)
    return {name: value for name, value in body.items() if name not in refusable}


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


class PromptTokensDetails(BaseModel):
    """What of the prompt tokens is special.

    Attributes:
        cached_tokens: those whose cache entries were shared with an earlier request.
    """

    cached_tokens: int
    audio_tokens: Literal[0]


class CompletionTokensDetails(BaseModel):
    """What of the completion tokens is special; `server.generation.prediction` defines the accepted ones.

    Attributes:
        accepted_prediction_tokens: output tokens taken over from the prediction.
        rejected_prediction_tokens: predicted tokens that the output did not take over; no part of completion_tokens.
    """

    reasoning_tokens: Literal[0]
    audio_tokens: Literal[0]
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class DecodingUsage(BaseModel):
    """How one API call was decoded, over all its choices (extension).

    Attributes:
        forward_passes: Jacobi iterations that yielded output, summed over the choices.
        tokens_per_forward: TPF, tokens that these accepted each; 1.0 is token by token.
        cached_tokens: prompt tokens that were not computed again.
    """

    forward_passes: int
    tokens_per_forward: float
    cached_tokens: int


class Usage(BaseModel):
    """Tokens of one API call, over all its choices; a prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    decoding: DecodingUsage | None = None
