"""What a client asks of the engine and what the engine answers, as typed values.

These structs cross the process border (msgspec, no pickle), so they hold plain data only. Known to every layer;
this module imports neither torch nor the layers above it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from cllm_core.config import MAX_BLOCK_LENGTH
from cllm_core.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorCode = Literal["failed", "queue_timeout", "ttft_timeout", "request_timeout"]

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """Values that a number may have: low to high, both included unless above_low."""

    low: float
    high: float
    above_low: bool = False

    def include(self, value: float) -> bool:
        """Whether the value is one of them; not-a-number is none."""
        return self.low <= value <= self.high and not (self.above_low and value == self.low)


BOUNDS: Mapping[str, Bounds] = {
    "temperature": Bounds(0.0, 100.0),
    "top_k": Bounds(0, 2**31),
    "top_p": Bounds(0.0, 1.0, above_low=True),
    "min_p": Bounds(0.0, 1.0),
    "presence_penalty": Bounds(-2.0, 2.0),
    "frequency_penalty": Bounds(-2.0, 2.0),
    "repetition_penalty": Bounds(0.0, 100.0, above_low=True),
    "seed": Bounds(-MAX_SEED - 1, MAX_SEED),
    "max_tokens": Bounds(0, 2**31),
    "min_tokens": Bounds(0, 2**31),
    "logprobs": Bounds(0, MAX_LOGPROBS),
    "prompt_logprobs": Bounds(0, MAX_LOGPROBS),
    "block_length": Bounds(1, MAX_BLOCK_LENGTH),
}
"""Of the numbers in SamplingParams, by field."""

_LOGIT_BIAS = Bounds(-100.0, 100.0)
_TOKEN_ID = Bounds(0, 2**31)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen and when to stop. Building one checks it (InvalidRequest names the field).

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
        min_p: drop tokens less likely than min_p times the likeliest; 0 keeps all.
        presence_penalty: subtracted once from the logit of every token that is in the output.
        frequency_penalty: subtracted from a token's logit for each time it is in the output.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
        logit_bias: token id -> value added to its logit (-100..100).
        seed: fixes the sample, whatever the batch and the block length; None draws one.
        max_tokens: output limit in tokens; None runs to the end of the context, 0 computes the prompt only.
        min_tokens: end-of-sequence and stop tokens cannot be chosen before this many output tokens.
        stop_token_ids: end the output; the stop token itself is the last of token_ids but not part of the text.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        stop: strings that end the output; applied by whoever turns tokens into text.
        logprobs: report the log-probability of every token and of this many alternatives (0..20); None is off.
        prompt_logprobs: the same for the prompt's tokens, all of which are computed then, cached or not.
        block_length: Jacobi block length n in tokens, 1 is AR; None takes the server's.
        drafters: names of the sources of drafts to choose among, of those that the server has; None takes all of them.
        gated: let the gated adapter propose, where one is loaded; what is accepted is the model's text either way.
        grammar: the whole output has to match it: an llguidance grammar in Lark syntax; `cllm_core.text.grammar` writes
            them from JSON schemas, regexes and choices. None is off. Where it leaves nothing but the end, the output
            may end before min_tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    block_length: int | None = None
    drafters: tuple[str, ...] | None = None
    gated: bool = True
    grammar: str | None = None

    def __post_init__(self) -> None:
        for field, bounds in BOUNDS.items():
            _check_number(field, getattr(self, field), bounds)
        for token_id, bias in self.logit_bias.items():
            _check_number("logit_bias", bias, _LOGIT_BIAS)
            _check_number("logit_bias token id", token_id, _TOKEN_ID)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens={self.min_tokens}: must not exceed max_tokens={self.max_tokens}", param="min_tokens"
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop: has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed", param="stop"
            )
        if self.drafters is not None and not self.drafters:
            raise InvalidRequest("drafters: names none; leave it out, or set block_length to 1", param="drafters")
        if any(not text for text in self.stop):
            raise InvalidRequest("stop: holds an empty string; every stop string needs a character", param="stop")
        if self.grammar is not None and self.ignore_eos:
            raise InvalidRequest(
                "ignore_eos: an output that has to match a grammar ends where the grammar does; leave ignore_eos out",
                param="ignore_eos",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def penalizes_output(self) -> bool:
        """Whether the output so far makes its tokens less or more likely."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def penalizes_repetition(self) -> bool:
        """Whether prompt and output so far do."""
        return self.repetition_penalty != 1

    @property
    def has_penalties(self) -> bool:
        """Whether the text so far acts on the choice of the next token beyond the model."""
        return self.penalizes_output or self.penalizes_repetition


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of SamplingParams that a checkpoint sets where a request leaves them out; None where it sets none.

    Attributes:
        max_tokens: of conversations; texts that are completed have a default of their own.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def values(self) -> dict[str, float | int]:
        """Those that it sets."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One output to decode.

    Attributes:
        request_id: unique among the requests alive.
        prompt_ids: at least one token.
        choice_index: which of the `n` choices of one API call this is; enters the sampling noise beside the seed.
        prediction_ids: what the client expects the output to be (OpenAI predicted outputs); seeds the draft only.
        cache_salt: requests share cached prefixes only with requests of the same salt.
        wants_draft: report with each step the predictions that were not accepted.
        adapter: name of the adapter to decode with, "" for the base model alone.
        user: whose request it is; users take turns in the queue and each may hold a part of it only. "" is nobody.
        weight: turns of the user for one of a user with weight 1; above 0.
        priority: lower goes before higher in the queue, whoever the users are.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    choice_index: int = 0
    prediction_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    wants_draft: bool = False
    adapter: str = ""
    user: str = ""
    weight: float = 1.0
    priority: int = 0


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities (natural log) at one position, from the raw logits: before temperature and penalties.

    Attributes:
        logprob: of the token that was accepted, or stands in the prompt.
        top_ids: the likeliest tokens, best first.
        top_logprobs: theirs, same order.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class DecodingStats(msgspec.Struct, frozen=True, kw_only=True):
    """How one request was decoded so far.

    Attributes:
        num_prompt_tokens: of the request.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        num_output_tokens: accepted and given to the client.
        num_forward_passes: passes that yielded output tokens; the last prompt chunk, which carries the first draft,
            is one of them, so AR has num_forward_passes == num_output_tokens.
        num_preemptions: times the request lost its cache blocks and was recomputed.
    """

    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_forward_passes: int = 0
    num_preemptions: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """TPF: accepted tokens per forward pass; 0.0 before the first."""
        return self.num_output_tokens / self.num_forward_passes if self.num_forward_passes else 0.0


class RequestTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of a request went in the engine, in seconds.

    Attributes:
        queue: from its arrival to the step that began with its prompt.
        prefill: from there to its first token.
        decode: from there to its last.
    """

    queue: float
    prefill: float
    decode: float


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step, or several that followed one another, brought one request.

    Exactly one of a request's outputs, the last, has a finish_reason.

    Attributes:
        token_ids: accepted, in order.
        logprobs: one per token of token_ids where the request asked for them, else None.
        prompt_logprobs: in the first output, where the request asked for them: one per prompt token but the first,
            which follows nothing. Else None.
        finish_reason: stop (end-of-sequence or stop token), length, abort (on request), error; None goes on.
        stop_token_id: the token of token_ids[-1] that ended the output, None where no token did.
        error: what went wrong, with finish_reason "error".
        error_code: the kind of it.
        draft_ids: predictions behind token_ids that were not accepted and may change, up to the first that would end
            the output; empty where the request did not ask for them and at its end.
        times: of a request that ended with a token, in its last output.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    error_code: ErrorCode | None = None
    draft_ids: tuple[int, ...] = ()
    times: RequestTimes | None = None
    stats: DecodingStats

    def followed_by(self, later: "RequestOutput") -> "RequestOutput":
        """This output and the next one of the same request as one."""
        return msgspec.structs.replace(
            later,
            token_ids=self.token_ids + later.token_ids,
            logprobs=None if later.logprobs is None else (self.logprobs or ()) + later.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


def _check_number(field: str, value: float | int | None, bounds: Bounds) -> None:
    if value is None:
        return
    if not bounds.include(value):
        left = "(" if bounds.above_low else "["
        raise InvalidRequest(
            f"{field}={value}: must be in {left}{bounds.low}, {bounds.high}]", param=field.partition(" ")[0]
        )
