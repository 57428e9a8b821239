"""The outputs of one API call, decoded together: submitted all or none, merged into one stream, always closed.

Knows texts and tokens but no response format.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

import anyio

from cllm_core.errors import CllmError, EngineFailed, EngineUnavailable, FirstTokenTimeout, QueueTimeout, RequestTimeout
from cllm_core.request import DecodingStats, ErrorCode, FinishReason, NewRequest, RequestOutput, RequestTimes
from cllm_core.text.codec import TextCodec
from cllm_core.text.stream import OutputText, PlacedLogprobs, TextDelta
from cllm_core.worker.engine_client import EngineClient

from ..http.record import FinishedOutput, RequestRecord
from ..ops.metrics import Metrics
from .choices import ChoiceDelta, ChoiceResult, TokenCounts, join_deltas
from .echo import ScoredPrompt, place_output, score_prompt
from .plan import GenerationPlan
from .prediction import PredictedText, PredictionAligner


@dataclass(slots=True)
class _Choice:
    """One output while it grows."""

    index: int
    request: NewRequest
    echo: str
    text: OutputText
    stream: AsyncGenerator[RequestOutput]
    stats: DecodingStats
    aligner: PredictionAligner
    last_chunk_at: float | None = None  # time.perf_counter() in seconds, None before the first token
    num_chars: int = 0  # of echo and output given so far
    has_ended: bool = False
    sum_logprob: float = 0.0  # of the tokens that usage counts; 0 where none were asked for

    @property
    def mean_logprob(self) -> float:
        return self.sum_logprob / max(1, self.text.num_tokens)


class Generation:
    """Runs the choices of one API call. Whoever starts one must close it, whatever happened meanwhile."""

    def __init__(
        self, engine: EngineClient, codec: TextCodec, plan: GenerationPlan, *, record: RequestRecord, metrics: Metrics
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._plan = plan
        self._record = record
        self._metrics = metrics
        self._predicted = PredictedText(plan.requests[0].prediction_ids)
        self._choices: list[_Choice] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._is_closed = False

    async def start(self) -> None:
        """Submit every choice, or none where the engine refuses one (EngineBusy, EngineUnavailable)."""
        try:
            for index, request in enumerate(self._plan.requests):
                self._choices.append(self._submit(index, request))
        except BaseException:
            await self.aclose()
            raise

    @property
    def num_choices(self) -> int:
        """How many outputs there are."""
        return len(self._choices)

    @property
    def is_complete(self) -> bool:
        """Whether every choice came to its end."""
        return all(choice.text.finished for choice in self._choices)

    @property
    def counts(self) -> TokenCounts:
        """Tokens so far."""
        first_of_prompt = [choice for choice in self._choices if choice.request.choice_index == 0]
        return TokenCounts(
            num_prompt=sum(len(choice.request.prompt_ids) for choice in first_of_prompt),
            num_cached=sum(choice.stats.num_cached_tokens for choice in first_of_prompt),
            num_completion=sum(choice.text.num_tokens for choice in self._choices),
            num_reasoning=sum(choice.text.num_reasoning_tokens for choice in self._choices),
            num_accepted_prediction=sum(choice.aligner.num_accepted for choice in self._choices),
            num_rejected_prediction=sum(choice.aligner.num_rejected for choice in self._choices),
            num_decoded=sum(choice.stats.num_output_tokens for choice in self._choices),
            num_forward_passes=sum(choice.stats.num_forward_passes for choice in self._choices),
        )

    def deltas(self) -> AsyncGenerator[ChoiceDelta]:
        """What the steps add, of all choices in the order of arrival; the last delta of each has a finish_reason.

        Raises:
            EngineFailed: the worker died or failed at one of them.
            EngineUnavailable: the engine stopped before they were done.
            RequestTimeout: one of them took longer than the server lets it.
            InvalidRequest: the worker, which knows the model, did not take one.
        """
        # One choice needs no task beside the reader's own: nothing is merged.
        return self._deltas_of(self._choices[0]) if len(self._choices) == 1 else self._merged_deltas()

    async def results(self) -> list[ChoiceResult]:
        """Wait for every choice and return them in order, or the best of each prompt; raises as `deltas` does."""
        parts: list[list[ChoiceDelta]] = [[] for _ in self._choices]
        async for delta in self.deltas():
            parts[delta.index].append(delta)
        results = [join_deltas(deltas) for deltas in parts]
        return results if self._plan.num_best is None else self._best(results, self._plan.num_best)

    async def aclose(self) -> None:
        """Abort what still runs, and count what the call came to. Safe to call again."""
        if self._is_closed:
            return
        self._is_closed = True
        # Shielded: whoever closes is often being cancelled, and blocks that stay allocated would be lost for good.
        with anyio.CancelScope(shield=True):
            for pump in self._pumps:
                pump.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)
            for choice in self._choices:
                await choice.stream.aclose()
                self._end(choice, "abort", None)
        self._fill_record()

    def _submit(self, index: int, request: NewRequest) -> _Choice:
        return _Choice(
            index=index,
            request=request,
            echo=self._plan.echoes[index],
            text=OutputText(
                self._codec,
                stop=request.params.stop,
                continues_text=self._plan.continues_text,
                syntax=self._plan.syntax,
            ),
            stream=self._engine.submit(request),
            stats=DecodingStats(num_prompt_tokens=len(request.prompt_ids)),
            aligner=PredictionAligner(self._predicted),
        )

    def _best(self, results: Sequence[ChoiceResult], num_best: int) -> list[ChoiceResult]:
        """The likeliest of each prompt's results, best first, numbered anew."""
        of_prompt: list[list[ChoiceResult]] = []
        for choice, result in zip(self._choices, results, strict=True):
            if choice.request.choice_index == 0:
                of_prompt.append([])
            of_prompt[-1].append(result)
        ranked = (sorted(group, key=lambda result: -self._choices[result.index].mean_logprob) for group in of_prompt)
        kept = (result for group in ranked for result in group[:num_best])
        return [replace(result, index=index) for index, result in enumerate(kept)]

    async def _merged_deltas(self) -> AsyncGenerator[ChoiceDelta]:
        queue: asyncio.Queue[ChoiceDelta | Exception] = asyncio.Queue()
        self._pumps = [asyncio.create_task(self._pump(choice, queue)) for choice in self._choices]
        num_open = len(self._choices)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            num_open -= item.finish_reason is not None
            yield item

    async def _pump(self, choice: _Choice, queue: asyncio.Queue[ChoiceDelta | Exception]) -> None:
        try:
            async for delta in self._deltas_of(choice):
                queue.put_nowait(delta)
        except Exception as error:  # whatever it is belongs to the reader of the queue
            queue.put_nowait(error)

    async def _deltas_of(self, choice: _Choice) -> AsyncGenerator[ChoiceDelta]:
        is_first = True
        async for output in choice.stream:
            delta = self._take(choice, output, is_first=is_first)
            is_first = False
            if choice.text.finished:
                # A stop string ends the text before the engine knows: closing aborts the request there.
                await choice.stream.aclose()
                yield delta
                return
            yield delta
        raise EngineFailed("the engine ended an output without a finish reason")

    def _take(self, choice: _Choice, output: RequestOutput, *, is_first: bool) -> ChoiceDelta:
        choice.stats = output.stats
        if output.finish_reason in ("error", "abort"):
            self._end(choice, output.finish_reason, None)
        _raise_if_broken(output)
        delta = choice.text.push(output)
        choice.aligner.push(delta.token_ids)
        choice.sum_logprob += sum(entry.logprob for entry in (output.logprobs or ())[: len(delta.token_ids)])
        self._observe_times(choice, delta)
        if choice.text.finished:
            self._end(choice, delta.finish_reason or "stop", output.times)
        text = choice.echo + delta.text if is_first else delta.text
        choice.num_chars += len(text)
        return ChoiceDelta(
            choice.index,
            is_first,
            text,
            self._logprobs(choice, delta, output),
            delta.finish_reason,
            calls=delta.calls,
            reasoning=delta.reasoning if self._plan.shows_reasoning else "",
            draft=delta.draft if choice.request.wants_draft else None,
            token_ids=delta.token_ids if self._plan.shows_token_ids else None,
            prompt_ids=choice.request.prompt_ids if self._plan.shows_token_ids and is_first else None,
            scored_prompt=self._scored_prompt(choice, output),
        )

    def _logprobs(self, choice: _Choice, delta: TextDelta, output: RequestOutput) -> tuple[PlacedLogprobs, ...]:
        if not self._plan.scores_echo:
            return delta.logprobs
        # a stop string leaves out what the step brought behind it
        stop_token_id = output.stop_token_id if len(delta.token_ids) == len(output.token_ids) else None
        return place_output(
            delta.logprobs, output.logprobs, stop_token_id, num_echoed=len(choice.echo), num_chars=choice.num_chars
        )

    def _scored_prompt(self, choice: _Choice, output: RequestOutput) -> ScoredPrompt | None:
        if output.prompt_logprobs is None:
            return None
        return score_prompt(choice.request.prompt_ids, output.prompt_logprobs, self._codec, echo=choice.echo)

    def _end(self, choice: _Choice, reason: FinishReason, times: RequestTimes | None) -> None:
        """Count a choice that has ended, once."""
        if choice.has_ended:
            return
        choice.has_ended = True
        ended = FinishedOutput(reason=reason, seconds=self._record.seconds, stats=choice.stats, times=times)
        self._record.outputs.append(ended)
        self._metrics.observe_output(ended, model=self._record.model)

    def _observe_times(self, choice: _Choice, delta: TextDelta) -> None:
        if not delta.token_ids:
            return
        now = time.perf_counter()
        if choice.last_chunk_at is None:
            self._metrics.observe_first_token(now - self._record.received_at, model=self._record.model)
        else:
            self._metrics.observe_gap(now - choice.last_chunk_at, model=self._record.model)
        choice.last_chunk_at = now

    def _fill_record(self) -> None:
        counts = self.counts
        self._record.num_prompt_tokens = counts.num_prompt
        self._record.num_cached_tokens = counts.num_cached
        self._record.num_completion_tokens = counts.num_completion
        self._record.num_forward_passes = counts.num_forward_passes
        if self._plan.requests[0].prediction_ids:
            self._metrics.observe_prediction(
                num_accepted=counts.num_accepted_prediction,
                num_rejected=counts.num_rejected_prediction,
                model=self._record.model,
            )


_ERRORS: dict[ErrorCode, type[CllmError]] = {
    "failed": EngineFailed,
    "queue_timeout": QueueTimeout,
    "ttft_timeout": FirstTokenTimeout,
    "request_timeout": RequestTimeout,
}


def _raise_if_broken(output: RequestOutput) -> None:
    if output.finish_reason == "error":
        raise _ERRORS[output.error_code or "failed"](output.error or "the engine failed at this request")
    if output.finish_reason == "abort":
        raise EngineUnavailable("the server is shutting down and ended this request")
