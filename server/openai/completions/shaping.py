"""From choices to the bodies of completions."""

from collections.abc import Iterable, Sequence
from typing import Literal

from cllm_core.request import FinishReason, TokenLogprobs
from cllm_core.text.codec import TextCodec
from server.generation.choices import ChoiceDelta, ChoiceResult, TokenCounts
from server.openai.completions.answer import Completion, CompletionChoice, CompletionLogprobs
from server.openai.shared.answers import AnswerHead, draft_field, final_reason, prompt_ids_field, token_ids_field
from server.openai.shared.text_frames import TextFrames, as_json


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
        chunk = self._completion([self._choice(delta).model_copy(update=draft_field(delta))])
        return chunk.model_copy(update={"usage": None}) if self._head.streams_usage else chunk

    def _choice(self, part: ChoiceDelta | ChoiceResult) -> CompletionChoice:
        choice = CompletionChoice(
            index=part.index,
            text=part.text,
            logprobs=_completion_logprobs(part, self._head.model.codec) if self._head.has_logprobs else None,
            finish_reason=_reason(part.finish_reason),
        )
        return choice.model_copy(update=token_ids_field(part) | prompt_ids_field(part))

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._head.answer_id,
            object="text_completion",
            created=self._head.created,
            model=self._head.model.name,
            system_fingerprint=self._head.model.fingerprint,
            choices=choices,
        )


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


def _reason(reason: FinishReason | None) -> Literal["stop", "length"] | None:
    return None if reason is None else final_reason(reason)
