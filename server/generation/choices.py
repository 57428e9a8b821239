"""The outputs of one API call, choice by choice: what a step adds, the whole, and the tokens counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cllm_core.errors import CllmError
from cllm_core.request import FinishReason
from cllm_core.text.stream import PlacedLogprobs
from cllm_core.text.tools.functions import FunctionCall
from cllm_core.text.tools.reader import CallDelta, join_calls

from .echo import ScoredPrompt


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one step added to one choice; `is_first` holds once per choice.

    Attributes:
        text: that comes before every call.
        reasoning: what the model thinks, which comes before the text.
        calls: what is new of calls of functions.
        draft: what may follow the text so far, None where the client did not ask.
        token_ids: that the step added, None where the client did not ask.
        prompt_ids: of the choice's prompt in its first delta, None elsewhere and where the client did not ask.
        scored_prompt: the same with log-probabilities, which stand before `logprobs`.
    """

    index: int
    is_first: bool
    text: str
    logprobs: tuple[PlacedLogprobs, ...]
    finish_reason: FinishReason | None
    calls: tuple[CallDelta, ...] = ()
    reasoning: str = ""
    draft: str | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_ids: tuple[int, ...] | None = None
    scored_prompt: ScoredPrompt | None = None

    @property
    def has_content(self) -> bool:
        """Whether a client that streams has to get it."""
        has_text = self.is_first or self.text or self.reasoning or self.calls
        return bool(has_text or self.logprobs or self.finish_reason or self.token_ids) or self.draft is not None

    @property
    def is_text_only(self) -> bool:
        """Whether it continues a text and holds nothing else."""
        is_more = self.is_first or self.logprobs or self.finish_reason or self.calls or self.scored_prompt
        shows_more = self.draft is not None or self.token_ids is not None or self.prompt_ids is not None
        return bool(self.text) and not self.reasoning and not is_more and not shows_more

    def with_text(self, text: str) -> "ChoiceDelta":
        """The same with another text."""
        return replace(self, text=text)

    def split(self) -> list["ChoiceDelta"]:
        """The same content in deltas that hold reasoning, or text, or one piece of one call, or the end of calls."""
        if self.reasoning and (self.text or self.calls):
            rest = replace(self._emptied(), text=self.text, logprobs=self.logprobs, calls=self.calls, draft=self.draft)
            head = replace(self, text="", logprobs=(), calls=(), draft=None, finish_reason=None)
            return [head, *replace(rest, finish_reason=self.finish_reason).split()]
        if not self.calls:
            return [self]
        head = replace(self, finish_reason=None, calls=())
        empty = replace(self._emptied(), draft=self.draft)
        pieces = [replace(empty, calls=(call,)) for call in self.calls]
        end = [] if self.finish_reason is None else [replace(empty, finish_reason=self.finish_reason)]
        return [part for part in (head, *pieces, *end) if part.has_content]

    def _emptied(self) -> "ChoiceDelta":
        """A delta of the same choice, with nothing new."""
        no_ids = None if self.token_ids is None else ()
        return ChoiceDelta(self.index, is_first=False, text="", logprobs=(), finish_reason=None, token_ids=no_ids)


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """One whole output; token_ids, prompt_ids and scored_prompt are None where the client did not ask."""

    index: int
    text: str
    calls: tuple[FunctionCall, ...]
    logprobs: tuple[PlacedLogprobs, ...]
    finish_reason: FinishReason
    token_ids: tuple[int, ...] | None
    prompt_ids: tuple[int, ...] | None
    scored_prompt: ScoredPrompt | None
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of the call so far; a prompt counts once, however many choices it has.

    Attributes:
        num_reasoning: of the completion.
        num_accepted_prediction, num_rejected_prediction: as PredictionAligner counts them.
        num_decoded: tokens that the engine accepted, those behind a stop string included.
    """

    num_prompt: int
    num_cached: int
    num_completion: int
    num_reasoning: int
    num_accepted_prediction: int
    num_rejected_prediction: int
    num_decoded: int
    num_forward_passes: int

    @property
    def tokens_per_forward(self) -> float:
        """TPF over all choices; 0.0 where nothing was decoded."""
        return self.num_decoded / self.num_forward_passes if self.num_forward_passes else 0.0


def join_deltas(deltas: Sequence[ChoiceDelta]) -> ChoiceResult:
    """The whole output of one choice, from all of its deltas."""
    last = deltas[-1]
    if last.finish_reason is None:
        raise CllmError(f"choice {last.index} has no end")
    logprobs = tuple(entry for delta in deltas for entry in delta.logprobs)
    shown = [delta.token_ids for delta in deltas if delta.token_ids is not None]
    return ChoiceResult(
        last.index,
        "".join(delta.text for delta in deltas),
        join_calls([call for delta in deltas for call in delta.calls]),
        logprobs,
        last.finish_reason,
        token_ids=tuple(token_id for ids in shown for token_id in ids) if shown else None,
        prompt_ids=deltas[0].prompt_ids,
        scored_prompt=deltas[0].scored_prompt,
        reasoning="".join(delta.reasoning for delta in deltas),
    )
