"""From choices to the bodies of completions."""

from collections.abc import Callable, Iterable, Sequence

from cllm_core.request import TokenLogprobs
from cllm_core.text.codec import TextCodec
from cllm_core.text.stream import PlacedLogprobs

from ...generation.choices import ChoiceDelta, ChoiceResult, TokenCounts
from ...generation.echo import ScoredPrompt
from ..shared.answers import AnswerHead, ChunkScript, final_reason
from ..shared.logprobs import off_loop_if_many
from ..shared.prompt_logprobs import prompt_logprobs
from ..shared.text_frames import TextFrames, as_json
from .answer import Completion, CompletionChoice, CompletionLogprobs


class CompletionAnswer:
    """Shapes completions.

    Args:
        scores_echo: the prompt is part of the log-probabilities.
        scores_prompt: its log-probabilities are a field of their own.
    """

    def __init__(self, head: AnswerHead, *, scores_echo: bool = False, scores_prompt: bool = False) -> None:
        self._head = head
        self._scores_echo = scores_echo
        self._scores_prompt = scores_prompt
        self._texts = TextFrames(self._delta_chunk)

    async def whole(self, results: Sequence[ChoiceResult], counts: TokenCounts) -> Completion:
        """The body of an answer that is not streamed."""
        choices = await off_loop_if_many(results, lambda: [self._choice(result) for result in results])
        completion = self._completion(choices)
        completion.usage = self._head.usage(counts)
        return completion

    def script(self, counts: Callable[[], TokenCounts]) -> ChunkScript:
        """The chunks of a streamed answer, whose tokens so far `counts` tells."""
        return self._head.script(self, counts)

    def chunks(self, delta: ChoiceDelta, counts: TokenCounts | None) -> Iterable[bytes]:
        """JSON of the chunk with what is new of one choice."""
        if delta.is_text_only and counts is None:
            return (self._texts.chunk(delta),)
        return (as_json(self._delta_chunk(delta, counts)),)

    def usage_chunk(self, counts: TokenCounts) -> bytes:
        """JSON of the chunk after the last choice, with the usage only."""
        chunk = self._completion([])
        chunk.usage = self._head.usage(counts)
        return as_json(chunk)

    def _delta_chunk(self, delta: ChoiceDelta, counts: TokenCounts | None = None) -> Completion:
        choice = self._choice(delta)
        if delta.draft is not None:
            choice.draft = delta.draft
        chunk = self._completion([choice])
        if self._head.streams_usage:
            chunk.usage = None if counts is None else self._head.usage(counts)
        return chunk

    def _choice(self, part: ChoiceDelta | ChoiceResult) -> CompletionChoice:
        choice = CompletionChoice(
            index=part.index,
            text=part.text,
            logprobs=self._logprobs(part) if self._head.has_logprobs else None,
            finish_reason=None if part.finish_reason is None else final_reason(part.finish_reason),
        )
        if part.token_ids is not None:
            choice.token_ids = list(part.token_ids)
        if part.prompt_ids is not None:
            choice.prompt_token_ids = list(part.prompt_ids)
        if part.scored_prompt is not None and self._scores_prompt:
            choice.prompt_logprobs = prompt_logprobs(part.scored_prompt, self._head.call.model.codec)
        return choice

    def _logprobs(self, part: ChoiceDelta | ChoiceResult) -> CompletionLogprobs:
        prompt = part.scored_prompt if self._scores_echo else None
        return _completion_logprobs(part.logprobs, prompt, self._head.call.model.codec)

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        call = self._head.call
        return Completion(
            id=call.id,
            object="text_completion",
            created=call.created,
            model=call.model.name,
            system_fingerprint=call.model.fingerprint,
            choices=choices,
        )


def _completion_logprobs(
    entries: Sequence[PlacedLogprobs], prompt: ScoredPrompt | None, codec: TextCodec
) -> CompletionLogprobs:
    ids = [entry.token_id for entry in entries]
    offsets = [entry.text_offset for entry in entries]
    logprobs: list[TokenLogprobs | None] = [entry.logprobs for entry in entries]
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
