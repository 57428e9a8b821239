"""What the answers of chat and text completions have in common: head, usage, extensions, the end of a stream."""

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from cllm_core.errors import CllmError
from cllm_core.request import FinishReason

from ...generation.choices import ChoiceDelta, TokenCounts
from ...http.errors import ErrorBody
from ...http.sse import encode_event
from .call import Call
from .sampling import GenerationRequest
from .text_frames import as_json
from .usage import CompletionTokensDetails, DecodingUsage, PromptTokensDetails, Usage


class ChunkedAnswer(Protocol):
    """Shapes an answer that streams in chunks: those of chat and text completions."""

    def chunks(self, delta: ChoiceDelta, counts: TokenCounts | None) -> Iterable[bytes]:
        """JSON of chunks with what is new of one choice, and with the usage where there are counts."""
        ...

    def usage_chunk(self, counts: TokenCounts) -> bytes:
        """JSON of the chunk after the last choice, with the usage only."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What every body of one answer has in common.

    Attributes:
        has_logprobs: whether the client asked for them.
        has_decoding_stats: whether usage shows how the call was decoded.
        streams_usage: whether a stream ends with it, which puts "usage": null into every other chunk.
        has_continuous_usage: whether every chunk of a stream has the usage so far instead.
    """

    call: Call
    has_logprobs: bool
    has_decoding_stats: bool
    streams_usage: bool
    has_continuous_usage: bool

    def script(self, answer: ChunkedAnswer, counts: Callable[[], TokenCounts]) -> "ChunkScript":
        """The chunks of a streamed answer, whose tokens so far `counts` tells."""
        return ChunkScript(answer, usage=self.streams_usage, counts=counts if self.has_continuous_usage else None)

    def usage(self, counts: TokenCounts) -> Usage:
        """The usage object."""
        usage = Usage(
            prompt_tokens=counts.num_prompt,
            completion_tokens=counts.num_completion,
            total_tokens=counts.num_prompt + counts.num_completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=counts.num_cached, audio_tokens=0),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=counts.num_reasoning,
                audio_tokens=0,
                accepted_prediction_tokens=counts.num_accepted_prediction,
                rejected_prediction_tokens=counts.num_rejected_prediction,
            ),
        )
        if self.has_decoding_stats:
            usage.decoding = _decoding(counts)
        return usage


def new_call_id() -> str:
    """Id of a call, unlike any other."""
    return f"call_{uuid.uuid4().hex}"


def _decoding(counts: TokenCounts) -> DecodingUsage:
    return DecodingUsage(
        forward_passes=counts.num_forward_passes,
        tokens_per_forward=round(counts.tokens_per_forward, 3),
        cached_tokens=counts.num_cached,
    )


def final_reason(reason: FinishReason) -> Literal["stop", "length"]:
    """The reason as answers give it; CllmError for one that should have become an error."""
    if reason in ("stop", "length"):
        return reason
    raise CllmError(f"finish reason {reason!r} has no answer: it should have become an error")


class ChunkScript:
    """A chunk for each delta, then the usage where it was requested, then [DONE].

    Args:
        counts: tells the tokens so far, for the usage in every chunk; None leaves it to the last one.
    """

    def __init__(self, answer: ChunkedAnswer, *, usage: bool, counts: Callable[[], TokenCounts] | None) -> None:
        self._answer = answer
        self._usage = usage
        self._counts = counts

    def opening(self) -> Iterable[bytes]:
        """Nothing: the first chunk opens the stream."""
        return ()

    def events(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """The chunks, unless the delta has no content."""
        if not delta.has_content:
            return ()
        return map(encode_event, self._answer.chunks(delta, None if self._counts is None else self._counts()))

    async def closing(self, counts: TokenCounts) -> Iterable[bytes]:
        """The usage, and the end mark."""
        usage = (encode_event(self._answer.usage_chunk(counts)),) if self._usage else ()
        return (*usage, encode_event(b"[DONE]"))

    async def failure(self, error: ErrorBody) -> bytes:
        """The error object."""
        return encode_event(as_json(error))

    async def cut(self, counts: TokenCounts) -> None:
        """Nothing: there is nothing to keep."""


def answer_head(call: Call, body: GenerationRequest, *, has_logprobs: bool) -> AnswerHead:
    """The head of the answer to a call."""
    return AnswerHead(
        call=call,
        has_logprobs=has_logprobs,
        has_decoding_stats=body.wants_decoding_stats,
        streams_usage=body.include_usage,
        has_continuous_usage=body.wants_continuous_usage,
    )
