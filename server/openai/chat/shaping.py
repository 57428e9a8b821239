"""From choices to the bodies of chat completions."""

from collections.abc import Callable, Iterable, Sequence

from cllm_core.request import FinishReason
from cllm_core.text.codec import TextCodec
from cllm_core.text.stream import PlacedLogprobs
from cllm_core.text.tools.reader import CallDelta

from ...generation.choices import ChoiceDelta, ChoiceResult, TokenCounts
from ..shared.answers import (
    AnswerHead,
    ChunkScript,
    final_reason,
    new_call_id,
)
from ..shared.logprobs import off_loop_if_many
from ..shared.prompt_logprobs import prompt_logprobs
from ..shared.text_frames import TextFrames, as_json
from ..shared.usage import Usage
from .answer import (
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
    FunctionDelta,
    TokenLogprob,
    ToolCallBody,
    ToolCallDelta,
)


class ChatAnswer:
    """Shapes chat completions.

    Args:
        may_call: whether functions may be called, so that an answer may have no text.
        calls_by_functions: calls have the form that belongs to the deprecated `functions`.
    """

    def __init__(self, head: AnswerHead, *, may_call: bool = False, calls_by_functions: bool = False) -> None:
        self._head = head
        self._may_call = may_call
        self._calls_by_functions = calls_by_functions
        self._calling: set[int] = set()  # choices whose calls have begun in the stream
        self._texts = TextFrames(self._delta_chunk)

    async def whole(self, results: Sequence[ChoiceResult], counts: TokenCounts) -> ChatCompletion:
        """The body of an answer that is not streamed."""
        return await off_loop_if_many(results, lambda: self._completion(results, counts))

    def _completion(self, results: Sequence[ChoiceResult], counts: TokenCounts) -> ChatCompletion:
        call = self._head.call
        completion = ChatCompletion(
            id=call.id,
            object="chat.completion",
            created=call.created,
            model=call.model.name,
            system_fingerprint=call.model.fingerprint,
            choices=[self._choice(result) for result in results],
            usage=self._head.usage(counts),
        )
        if results[0].prompt_ids is not None:
            completion.prompt_token_ids = list(results[0].prompt_ids)
        if results[0].scored_prompt is not None:
            completion.prompt_logprobs = prompt_logprobs(results[0].scored_prompt, call.model.codec)
        return completion

    def script(self, counts: Callable[[], TokenCounts]) -> ChunkScript:
        """The chunks of a streamed answer, whose tokens so far `counts` tells."""
        return self._head.script(self, counts)

    def chunks(self, delta: ChoiceDelta, counts: TokenCounts | None) -> Iterable[bytes]:
        """JSON of chunks with what is new of one choice; its first one names the role."""
        if delta.is_text_only and counts is None:
            return (self._texts.chunk(delta),)
        return [as_json(self._delta_chunk(part, counts)) for part in delta.split()]

    def usage_chunk(self, counts: TokenCounts) -> bytes:
        """JSON of the chunk after the last choice, with the usage only."""
        return as_json(self._chunk([], self._head.usage(counts)))

    def _delta_chunk(self, delta: ChoiceDelta, counts: TokenCounts | None = None) -> ChatCompletionChunk:
        if delta.calls:
            self._calling.add(delta.index)
        choice = ChunkChoice(
            index=delta.index,
            delta=self._delta(delta),
            logprobs=self._choice_logprobs(delta.logprobs) if delta.logprobs else None,
            finish_reason=self._reason(delta.finish_reason, is_calling=delta.index in self._calling),
        )
        if delta.draft is not None:
            choice.draft = delta.draft
        if delta.token_ids is not None:
            choice.token_ids = list(delta.token_ids)
        chunk = self._chunk([choice], None if counts is None else self._head.usage(counts))
        if delta.prompt_ids is not None:
            chunk.prompt_token_ids = list(delta.prompt_ids)
        return chunk

    def _delta(self, delta: ChoiceDelta) -> Delta:
        """What is new; the first delta of an answer always has content, null where calls may come instead."""
        body = Delta()
        if delta.is_first:
            body.role = "assistant"
            body.content = None if self._may_call else ""
        if delta.reasoning:
            body.reasoning_content = delta.reasoning
        if delta.text:
            body.content = delta.text
        if delta.calls and self._calls_by_functions:
            body.function_call = _function_delta(delta.calls[0])
        elif delta.calls:
            body.tool_calls = [_call_delta(call) for call in delta.calls]
        return body

    def _reason(self, reason: FinishReason | None, *, is_calling: bool) -> ChatFinishReason | None:
        return None if reason is None else self._final_reason(reason, is_calling=is_calling)

    def _final_reason(self, reason: FinishReason, *, is_calling: bool) -> ChatFinishReason:
        final = final_reason(reason)
        if final == "length" or not is_calling:
            return final
        return "function_call" if self._calls_by_functions else "tool_calls"

    def _choice(self, result: ChoiceResult) -> ChatChoice:
        choice = ChatChoice(
            index=result.index,
            message=self._message(result),
            logprobs=self._choice_logprobs(result.logprobs),
            finish_reason=self._final_reason(result.finish_reason, is_calling=bool(result.calls)),
        )
        if result.token_ids is not None:
            choice.token_ids = list(result.token_ids)
        return choice

    def _message(self, result: ChoiceResult) -> AnswerMessage:
        message = AnswerMessage(role="assistant", content=result.text, refusal=None)
        if result.reasoning:
            message.reasoning_content = result.reasoning
        if not result.calls:
            return message
        message.content = result.text or None
        functions = [CalledFunctionBody(name=call.name, arguments=call.arguments) for call in result.calls]
        if self._calls_by_functions:
            message.function_call = functions[0]
        else:
            message.tool_calls = [
                ToolCallBody(id=new_call_id(), type="function", function=function) for function in functions
            ]
        return message

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        call = self._head.call
        chunk = ChatCompletionChunk(
            id=call.id,
            object="chat.completion.chunk",
            created=call.created,
            model=call.model.name,
            system_fingerprint=call.model.fingerprint,
            choices=choices,
        )
        if self._head.streams_usage:
            chunk.usage = usage
        return chunk

    def _choice_logprobs(self, entries: Sequence[PlacedLogprobs]) -> ChatLogprobs | None:
        if not self._head.has_logprobs:
            return None
        codec = self._head.call.model.codec
        return ChatLogprobs(content=[chosen_token(entry, codec) for entry in entries], refusal=None)


def _call_delta(call: CallDelta) -> ToolCallDelta:
    function = _function_delta(call)
    if call.name is None:
        return ToolCallDelta(index=call.index, function=function)
    return ToolCallDelta(index=call.index, id=new_call_id(), type="function", function=function)


def _function_delta(call: CallDelta) -> FunctionDelta:
    if call.name is None:
        return FunctionDelta(arguments=call.arguments)
    return FunctionDelta(name=call.name, arguments=call.arguments)


def chosen_token(entry: PlacedLogprobs, codec: TextCodec) -> ChosenTokenLogprob:
    """A token of an answer with its alternatives."""
    tops = zip(entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True)
    return ChosenTokenLogprob(
        token=codec.token_text(entry.token_id),
        bytes=list(codec.token_bytes(entry.token_id)),
        logprob=entry.logprobs.logprob,
        top_logprobs=[_token(token_id, logprob, codec) for token_id, logprob in tops],
    )


def _token(token_id: int, logprob: float, codec: TextCodec) -> TokenLogprob:
    return TokenLogprob(token=codec.token_text(token_id), bytes=list(codec.token_bytes(token_id)), logprob=logprob)
