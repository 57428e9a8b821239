"""Decodes prompts greedily in an engine and keeps what the figures need: trajectory, passes and wall-clock times."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from cllm_core.engine.engine import Engine
from cllm_core.engine.plan import PlannedRow, RowResult, StepPlan, StepResult
from cllm_core.errors import EngineFailed
from cllm_core.evaluation.trajectory import Iteration, Trajectory
from cllm_core.request import FinishReason, NewRequest, RequestOutput, SamplingParams


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to continue, and how far."""

    token_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """One finished output.

    Attributes:
        trajectory: output tokens (a stop token is the last) and the iterations that made them.
        finish_reason: stop or length.
        seconds: from the request to its last token. Means little where several were decoded together.
        first_seconds: from the request to its first tokens, which is the prefill.
    """

    trajectory: Trajectory
    finish_reason: FinishReason
    seconds: float
    first_seconds: float

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The output."""
        return self.trajectory.output_ids


def decode(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    block_length: int,
    cache_salt: str = "",
    drafters: tuple[str, ...] | None = None,
    gated: bool = True,
    in_flight: int | None = None,
) -> list[Decoded]:
    """Decode prompts together, greedily.

    Args:
        engine: without work; its observer is replaced while this runs.
        prompts: each fits the engine's context.
        block_length: Jacobi block length n in tokens; 1 is AR.
        cache_salt: only what was decoded with the same one may be found in a prefix cache, or among past outputs.
        drafters: sources of drafts to choose among, None for all that the engine has.
        gated: let a gated adapter propose, too, where there is one.
        in_flight: requests at a time, the next one following when one has ended; None for all at once.

    Returns:
        One output per prompt, in order.

    Raises:
        RequestError: a prompt does not fit; nothing is decoded then.
        EngineFailed: the engine dropped a request.
    """
    recordings = {str(index): _Recording() for index in range(len(prompts))}
    waiting = iter(
        NewRequest(
            request_id=str(index),
            prompt_ids=prompt.token_ids,
            params=SamplingParams(
                temperature=0.0,
                max_tokens=prompt.max_tokens,
                block_length=block_length,
                drafters=drafters,
                gated=gated,
            ),
            cache_salt=cache_salt,
        )
        for index, prompt in enumerate(prompts)
    )
    started: dict[str, float] = {}
    with _observed(engine, recordings):
        free = len(prompts) if in_flight is None else in_flight
        while True:
            for request in islice(waiting, free):
                started[request.request_id] = time.perf_counter()
                engine.add_request(request)
            free = 0
            if not engine.has_work():
                break
            for output in engine.step():
                recordings[output.request_id].commit(output, time.perf_counter() - started[output.request_id])
                free += output.finish_reason is not None
    return [recording.finish() for recording in recordings.values()]


@contextmanager
def _observed(engine: Engine, recordings: "dict[str, _Recording]") -> Iterator[None]:
    """Record every iteration; whatever happens, leave the engine without work and with the observer it had."""

    def observe(plan: StepPlan, result: StepResult) -> None:
        for row, row_result in zip(plan.rows, result.rows, strict=True):
            if row_result.num_accepted:
                recordings[row.request_id].observe(row, row_result)

    before, engine.observer = engine.observer, observe
    try:
        yield
    finally:
        engine.observer = before
        for request_id in recordings:
            engine.abort(request_id)
        while engine.has_work():
            engine.step()


@dataclass(slots=True)
class _Recording:
    """An output that grows."""

    token_ids: list[int] = field(default_factory=list)
    iterations: list[Iteration] = field(default_factory=list)
    pending: Iteration | None = None
    finish_reason: FinishReason | None = None
    first_seconds: float = 0.0
    seconds: float = 0.0

    def observe(self, row: PlannedRow, result: RowResult) -> None:
        """Keep the iteration; how many of its tokens become output is known once the step is booked."""
        self.pending = Iteration(
            first_position=len(self.token_ids),
            draft_ids=result.window_ids[1:],
            num_accepted=result.num_accepted,
            has_prompt=row.num_tokens > row.num_sampled or not self.token_ids,
        )

    def commit(self, output: RequestOutput, seconds: float) -> None:
        """Book what the step brought: tokens behind a stop token or beyond the limit are no output."""
        if self.pending is not None and output.token_ids:
            pending, self.pending = self.pending, None
            self.iterations.append(
                Iteration(
                    first_position=pending.first_position,
                    draft_ids=pending.draft_ids,
                    num_accepted=len(output.token_ids),
                    has_prompt=pending.has_prompt,
                )
            )
            self.token_ids += output.token_ids
            self.first_seconds = self.first_seconds or seconds
        self.seconds = seconds
        self.finish_reason = output.finish_reason

    def finish(self) -> Decoded:
        if self.finish_reason not in ("stop", "length"):
            raise EngineFailed(f"an output ended as {self.finish_reason}; expected stop or length")
        return Decoded(
            trajectory=Trajectory(tuple(self.token_ids), tuple(self.iterations)),
            finish_reason=self.finish_reason,
            seconds=self.seconds,
            first_seconds=self.first_seconds,
        )
