"""From choices to the bodies of chat completions."""

from collections.abc import Iterable, Sequence
from typing import Literal

from cllm_core.request import FinishReason
from cllm_core.text.codec import TextCodec
from cllm_core.text.stream import PlacedLogprobs
from cllm_core.text.tools.reader import CallDelta
from server.generation.choices import ChoiceDelta, ChoiceResult, TokenCounts
from server.openai.chat.answer import (
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
from server.openai.shared.answers import (
    AnswerHead,
    draft_field,
    final_reason,
    new_call_id,
    prompt_ids_field,
    token_ids_field,
)
from server.openai.shared.text_frames import TextFrames, as_json
from server.openai.shared.usage import Usage


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
        return completion.model_copy(update=prompt_ids_field(results[0]))

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
        chunk = self._chunk([choice.model_copy(update=draft_field(delta) | token_ids_field(delta))], None)
        return chunk.model_copy(update=prompt_ids_field(delta))

    def usage_chunk(self, counts: TokenCounts) -> bytes:
        """JSON of the chunk after the last choice, with the usage only."""
        return as_json(self._chunk([], self._head.usage(counts)))

    def _choice(self, result: ChoiceResult) -> ChatChoice:
        choice = ChatChoice(
            index=result.index,
            message=self._message(result),
            logprobs=self._choice_logprobs(result.logprobs),
            finish_reason=_called(final_reason(result.finish_reason), is_calling=bool(result.calls)),
        )
        return choice.model_copy(update=token_ids_field(result))

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


def _role(delta: ChoiceDelta) -> dict[str, str]:
    return {"role": "assistant"} if delta.is_first else {}


def _call_deltas(delta: ChoiceDelta) -> dict[str, list[dict[str, object]]]:
    return {"tool_calls": [_call_delta(call) for call in delta.calls]} if delta.calls else {}


def _call_delta(call: CallDelta) -> dict[str, object]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    begun = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": new_call_id(), "type": "function", "function": begun}


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


def _chat_reason(reason: FinishReason | None, *, is_calling: bool) -> ChatFinishReason | None:
    return None if reason is None else _called(final_reason(reason), is_calling=is_calling)


def _called(reason: Literal["stop", "length"], *, is_calling: bool) -> ChatFinishReason:
    return "tool_calls" if reason == "stop" and is_calling else reason
