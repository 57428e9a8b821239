"""The Jacobi trajectory of one output, and the counts that tell how it converged. No torch in here.

A trajectory is the list of iterations that yielded tokens. Positions count output tokens from 0. The terms (draft,
accepted, fast-forwarded, stationary) are those of `engine.jacobi`; here they become exact:

- *fast-forwarded*, per iteration: accepted tokens beyond the first, which AR would have given too.
- *stationary*, per token: its draft was right in an iteration that did not accept it, because a draft token before it
  was wrong, and stayed right in every iteration until it was accepted.

::

    position        0 1 2 3 4 5      n = 4: three drafts, four predictions
    output          a b c d e f
    iteration 0     x x c            accepts a        c is right although b before it is not
    iteration 1       b c x          accepts b c d    fast-forwarded: c d; stationary: c
    iteration 2             e x      accepts e f      fast-forwarded: f
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Iteration:
    """One forward pass that yielded tokens.

    Attributes:
        first_position: of the first token it predicts; equal to the number of tokens accepted before.
        draft_ids: n - 1 guesses for first_position and after.
        num_accepted: tokens that became output, 1..n.
        has_prompt: the pass computed prompt tokens too (prefill).
    """

    first_position: int
    draft_ids: tuple[int, ...]
    num_accepted: int
    has_prompt: bool = False

    @property
    def end_position(self) -> int:
        """Position after the last accepted token."""
        return self.first_position + self.num_accepted


@dataclass(frozen=True, slots=True)
class Trajectory:
    """An output and the iterations that made it, in order."""

    output_ids: tuple[int, ...]
    iterations: tuple[Iteration, ...]

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens accepted in passes that computed prompt tokens too."""
        return sum(iteration.num_accepted for iteration in self.iterations if iteration.has_prompt)

    @property
    def num_prefill_passes(self) -> int:
        """Passes that yielded tokens and computed prompt tokens too."""
        return sum(iteration.has_prompt for iteration in self.iterations)


class TokenState(Enum):
    """A token of the output as one iteration sees it."""

    SETTLED = "accepted before"
    ACCEPTED = "accepted now"
    RIGHT = "draft right, not accepted"
    WRONG = "draft wrong"
    OUTSIDE = "not in the window"


def count_fast_forwarded(trajectory: Trajectory) -> int:
    """Accepted tokens beyond the first of each iteration."""
    return sum(iteration.num_accepted - 1 for iteration in trajectory.iterations)


def count_stationary(trajectory: Trajectory) -> int:
    """Tokens that were right before everything ahead of them was, and stayed so until they were accepted."""
    early: set[int] = set()  # right in the last iteration that drafted them, and not accepted by it
    count = 0
    for iteration in trajectory.iterations:
        right = _right_positions(iteration, trajectory.output_ids)
        drafted = set(range(iteration.first_position, iteration.first_position + len(iteration.draft_ids)))
        accepted = set(range(iteration.first_position, iteration.end_position))
        kept = early - (drafted - right)  # what a window cut short does not show has not changed
        count += len(accepted & kept)
        early = (kept | right) - accepted
    return count


def token_states(trajectory: Trajectory) -> list[list[TokenState]]:
    """State of every output token (columns) in every iteration (rows)."""
    return [_states_in(iteration, trajectory.output_ids) for iteration in trajectory.iterations]


def settled_at(trajectory: Trajectory) -> list[int]:
    """Index of the iteration that accepted each output token."""
    return [index for index, iteration in enumerate(trajectory.iterations) for _ in range(iteration.num_accepted)]


def repetition_rate(token_ids: Sequence[int], n: int = 4) -> float:
    """rep-n: share of n-grams that occurred before in the same text, 0..1 (Welleck et al. 2019, arXiv:1908.04319)."""
    grams = [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def has_run(token_ids: Sequence[int], length: int) -> bool:
    """Whether the same token stands so many times in a row."""
    return any(sum(1 for _ in run) >= length for _, run in groupby(token_ids))


def _right_positions(iteration: Iteration, output_ids: Sequence[int]) -> set[int]:
    """Positions whose draft is what the output has there."""
    first = iteration.first_position
    return {
        first + offset
        for offset, (draft, final) in enumerate(zip(iteration.draft_ids, output_ids[first:], strict=False))
        if draft == final
    }


def _states_in(iteration: Iteration, output_ids: Sequence[int]) -> list[TokenState]:
    right = _right_positions(iteration, output_ids)
    drafted_end = iteration.first_position + len(iteration.draft_ids)
    states = []
    for position in range(len(output_ids)):
        if position < iteration.first_position:
            states.append(TokenState.SETTLED)
        elif position < iteration.end_position:
            states.append(TokenState.ACCEPTED)
        elif position >= drafted_end:
            states.append(TokenState.OUTSIDE)
        else:
            states.append(TokenState.RIGHT if position in right else TokenState.WRONG)
    return states
