"""From choices to response bodies: one class per endpoint, whole answers and stream chunks alike."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel

from cllm_core.errors import CllmError
from cllm_core.request import FinishReason, TokenLogprobs
from cllm_core.text.codec import TextCodec
from cllm_core.text.stream import PlacedLogprobs
from cllm_core.text.tools.reader import CallDelta
from server.generation.generation import ChoiceDelta, ChoiceResult, TokenCounts
from server.generation.served_models import LoadedModel
from server.openai.chat.body import (
    AnswerMessage,
    CalledFunctionBody,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatFinishReason,
    ChatLogprobs,
    ChosenTokenLogprob,
    ChunkChoice,
    Delta,
    TokenLogprob,
    ToolCallBody,
)
from server.openai.completions.body import Completion, CompletionChoice, CompletionLogprobs
from server.openai.shared.fields import CompletionTokensDetails, DecodingUsage, PromptTokensDetails, Usage
from server.openai.shared.text_frames import TextFrames, as_json


class Answer(Protocol):
    """Shapes the answer to one API call."""

    def whole(self, results: Sequence[ChoiceResult], counts: TokenCounts) -> BaseModel:
        """The body of an answer that is not streamed."""
        ...

    def chunks(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """JSON of chunks with what is new of one choice."""
        ...

    def usage_chunk(self, counts: TokenCounts) -> bytes:
        """JSON of the chunk after the last choice, with the usage only."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What every body of one answer has in common.

    Attributes:
        created: Unix time in seconds.
        has_logprobs: whether the client asked for them.
        has_decoding_stats: whether usage tells how the call was decoded.
        streams_usage: whether a stream ends with it, which puts "usage": null into every other chunk.
    """

    answer_id: str
    created: int
    model: LoadedModel
    has_logprobs: bool
    has_decoding_stats: bool
    streams_usage: bool

    def usage(self, counts: TokenCounts) -> Usage:
        """The usage object."""
        usage = Usage(
            prompt_tokens=counts.num_prompt,
            completion_tokens=counts.num_completion,
            total_tokens=counts.num_prompt + counts.num_completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=counts.num_cached, audio_tokens=0),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=0,
                audio_tokens=0,
                accepted_prediction_tokens=counts.num_accepted_prediction,
                rejected_prediction_tokens=counts.num_rejected_prediction,
            ),
        )
        return usage.model_copy(update={"decoding": _decoding(counts)}) if self.has_decoding_stats else usage


class ChatAnswer:
    """Shapes chat completions.

    Args:
        may_call: whether functions may be called, so that an answer may have no text.
    """

    def __init__(self, head: AnswerHead, *, may_call: bool = False) -> None:
        self._head = head
        self._may_call = may_call
        self._calling: set[int] = set()  # choices whose calls have begun in the stream
        self._texts = TextFrames(self._delta_chunk)

    def whole(self, results: Sequence[ChoiceResult], counts: TokenCounts) -> ChatCompletion:
        """The body of an answer that is not streamed."""
        choices = [self._choice(result) for result in results]
        completion = ChatCompletion(
            id=self._head.answer_id,
            object="chat.completion",
            created=self._head.created,
            model=self._head.model.name,
            system_fingerprint=self._head.model.fingerprint,
            choices=choices,
            usage=self._head.usage(counts),
        )
        return completion.model_copy(update=_prompt_tokens(results[0]))

    def chunks(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """JSON of chunks with what is new of one choice; its first one names the role."""
        if delta.is_text_only:
            return (self._texts.chunk(delta),)
        return [as_json(self._delta_chunk(part)) for part in delta.split()]

    def _delta_chunk(self, delta: ChoiceDelta) -> ChatCompletionChunk:
        if delta.calls:
            self._calling.add(delta.index)
        choice = ChunkChoice(
            index=delta.index,
            delta=Delta.model_validate({**_role(delta), **self._content(delta), **_call_deltas(delta)}),
            logprobs=self._choice_logprobs(delta.logprobs) if delta.logprobs else None,
            finish_reason=_chat_reason(delta.finish_reason, is_calling=delta.index in self._calling),
        )
        chunk = self._chunk([choice.model_copy(update=_draft(delta) | _tokens(delta))], None)
        return chunk.model_copy(update=_prompt_tokens(delta))

    def usage_chunk(self, counts: TokenCounts) -> bytes:
        """JSON of the chunk after the last choice, with the usage only."""
        return as_json(self._chunk([], self._head.usage(counts)))

    def _choice(self, result: ChoiceResult) -> ChatChoice:
        choice = ChatChoice(
            index=result.index,
            message=self._message(result),
            logprobs=self._choice_logprobs(result.logprobs),
            finish_reason=_called(_final(result.finish_reason), is_calling=bool(result.calls)),
        )
        return choice.model_copy(update=_tokens(result))

    def _message(self, result: ChoiceResult) -> AnswerMessage:
        if not result.calls:
            return AnswerMessage(role="assistant", content=result.text, refusal=None)
        calls = [
            ToolCallBody(
                id=new_call_id(),
                type="function",
                function=CalledFunctionBody(name=call.name, arguments=call.arguments),
            )
            for call in result.calls
        ]
        return AnswerMessage(role="assistant", content=result.text or None, refusal=None, tool_calls=calls)

    def _content(self, delta: ChoiceDelta) -> dict[str, str | None]:
        """Text; in the first delta of an answer always, null where calls may come instead."""
        if delta.text:
            return {"content": delta.text}
        if not delta.is_first:
            return {}
        return {"content": None if self._may_call else ""}

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._head.answer_id,
            object="chat.completion.chunk",
            created=self._head.created,
            model=self._head.model.name,
            system_fingerprint=self._head.model.fingerprint,
            choices=choices,
        )
        return chunk.model_copy(update={"usage": usage}) if self._head.streams_usage else chunk

    def _choice_logprobs(self, entries: Sequence[PlacedLogprobs]) -> ChatLogprobs | None:
        if not self._head.has_logprobs:
            return None
        codec = self._head.model.codec
        return ChatLogprobs(content=[_chosen_token(entry, codec) for entry in entries], refusal=None)


class CompletionAnswer:
    """Shapes completions."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self._texts = TextFrames(self._delta_chunk)

    def whole(self, results: Sequence[ChoiceResult], counts: TokenCounts) -> Completion:
        """The body of an answer that is not streamed."""
        choices = [self._choice(result) for result in results]
        return self._completion(choices).model_copy(update={"usage": self._head.usage(counts)})

    def chunks(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """JSON of the chunk with what is new of one choice."""
        return (self._texts.chunk(delta) if delta.is_text_only else as_json(self._delta_chunk(delta)),)

    def usage_chunk(self, counts: TokenCounts) -> bytes:
        """JSON of the chunk after the last choice, with the usage only."""
        return as_json(self._completion([]).model_copy(update={"usage": self._head.usage(counts)}))

    def _delta_chunk(self, delta: ChoiceDelta) -> Completion:
        chunk = self._completion([self._choice(delta).model_copy(update=_draft(delta))])
        return chunk.model_copy(update={"usage": None}) if self._head.streams_usage else chunk

    def _choice(self, part: ChoiceDelta | ChoiceResult) -> CompletionChoice:
        choice = CompletionChoice(
            index=part.index,
            text=part.text,
            logprobs=_completion_logprobs(part, self._head.model.codec) if self._head.has_logprobs else None,
            finish_reason=_reason(part.finish_reason),
        )
        return choice.model_copy(update=_tokens(part) | _prompt_tokens(part))

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._head.answer_id,
            object="text_completion",
            created=self._head.created,
            model=self._head.model.name,
            system_fingerprint=self._head.model.fingerprint,
            choices=choices,
        )


def new_call_id() -> str:
    """Id of a call, unlike any other."""
    return f"call_{uuid.uuid4().hex}"


def _role(delta: ChoiceDelta) -> dict[str, str]:
    return {"role": "assistant"} if delta.is_first else {}


def _call_deltas(delta: ChoiceDelta) -> dict[str, list[dict[str, object]]]:
    return {"tool_calls": [_call_delta(call) for call in delta.calls]} if delta.calls else {}


def _call_delta(call: CallDelta) -> dict[str, object]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    begun = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": new_call_id(), "type": "function", "function": begun}


# Extensions that a client has to ask for; where it did not, not even the field appears.


def _draft(delta: ChoiceDelta) -> dict[str, str]:
    return {} if delta.draft is None else {"draft": delta.draft}


def _tokens(part: ChoiceDelta | ChoiceResult) -> dict[str, list[int]]:
    return {} if part.token_ids is None else {"token_ids": list(part.token_ids)}


def _prompt_tokens(part: ChoiceDelta | ChoiceResult) -> dict[str, list[int]]:
    return {} if part.prompt_ids is None else {"prompt_token_ids": list(part.prompt_ids)}


def _decoding(counts: TokenCounts) -> DecodingUsage:
    return DecodingUsage(
        forward_passes=counts.num_forward_passes,
        tokens_per_forward=round(counts.tokens_per_forward, 3),
        cached_tokens=counts.num_cached,
    )


def _chosen_token(entry: PlacedLogprobs, codec: TextCodec) -> ChosenTokenLogprob:
    tops = zip(entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True)
    return ChosenTokenLogprob(
        token=codec.token_text(entry.token_id),
        bytes=list(codec.token_bytes(entry.token_id)),
        logprob=entry.logprobs.logprob,
        top_logprobs=[_token(token_id, logprob, codec) for token_id, logprob in tops],
    )


def _token(token_id: int, logprob: float, codec: TextCodec) -> TokenLogprob:
    return TokenLogprob(token=codec.token_text(token_id), bytes=list(codec.token_bytes(token_id)), logprob=logprob)


def _completion_logprobs(part: ChoiceDelta | ChoiceResult, codec: TextCodec) -> CompletionLogprobs:
    ids = [entry.token_id for entry in part.logprobs]
    offsets = [entry.text_offset for entry in part.logprobs]
    logprobs: list[TokenLogprobs | None] = [entry.logprobs for entry in part.logprobs]
    prompt = part.scored_prompt
    if prompt is not None:
        ids = [*prompt.token_ids, *ids]
        offsets = [*prompt.text_offsets, *offsets]
        logprobs = [None, *prompt.logprobs, *logprobs]
    return CompletionLogprobs(
        tokens=[codec.token_text(token_id) for token_id in ids],
        token_logprobs=[None if entry is None else entry.logprob for entry in logprobs],
        top_logprobs=[
            None if entry is None else _top_texts(token_id, entry, codec)
            for token_id, entry in zip(ids, logprobs, strict=True)
        ],
        text_offset=offsets,
    )


def _top_texts(chosen_id: int, entry: TokenLogprobs, codec: TextCodec) -> dict[str, float]:
    tops = zip(entry.top_ids, entry.top_logprobs, strict=True)
    texts = {codec.token_text(token_id): logprob for token_id, logprob in tops}
    texts.setdefault(codec.token_text(chosen_id), entry.logprob)
    return texts


def _chat_reason(reason: FinishReason | None, *, is_calling: bool) -> ChatFinishReason | None:
    return None if reason is None else _called(_final(reason), is_calling=is_calling)


def _called(reason: Literal["stop", "length"], *, is_calling: bool) -> ChatFinishReason:
    return "tool_calls" if reason == "stop" and is_calling else reason


def _reason(reason: FinishReason | None) -> Literal["stop", "length"] | None:
    return None if reason is None else _final(reason)


def _final(reason: FinishReason) -> Literal["stop", "length"]:
    if reason in ("stop", "length"):
        return reason
    raise CllmError(f"finish reason {reason!r} has no answer: it should have become an error")
