"""Which gated blocks a step computes: behind how many of the lengths that may be accepted, and of how many rows.

More blocks make it likelier that the next draft is there, larger ones make it longer; both make the step slower for all
rows. As window lengths do (`draft_length`), they follow the load and what was measured: how often proposals are
confirmed by depth, what windows without proposals accept, and how long a step of so many tokens takes.
Host only, no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cllm_core.config import GatedForm
from cllm_core.engine.draft_length import EXPLORE_EVERY, Confirmations
from cllm_core.engine.plan import GatedBlocks
from cllm_core.engine.step_times import Floats, StepTimes

# Chances that a token is confirmed, given that the one before it was: proposed, or drafted otherwise.
_INITIAL_PROPOSED, _INITIAL_OTHER = 0.6, 0.3
_REQUEST_RATE = 0.1
_SHARED_RATE = 0.02
_SHARED_PRIOR_WINDOWS = 8


@dataclass(frozen=True, slots=True)
class GatedRules:
    """How an adapter proposes.

    Attributes:
        adapter_id: of the rows that it computes.
        form: of what its rows read and see (EngineConfig.gated_form).
        max_size: most rows of a block, at least 1.
    """

    adapter_id: int
    form: GatedForm
    max_size: int


@dataclass(frozen=True, slots=True)
class GatedRow:
    """A request that may have gated blocks.

    Attributes:
        request_id: of it.
        window: tokens of its next window.
        num_proposed: draft tokens that were proposed.
        num_left: output tokens still wanted.
    """

    request_id: str
    window: int
    num_proposed: int
    num_left: int


class _Learnt:
    """How far drafts are confirmed, those proposed and others."""

    def __init__(self, proposed: Sequence[float], other: Sequence[float], rate: float, num_prior: float) -> None:
        self.proposed = Confirmations(proposed, rate=rate, num_prior=num_prior)
        self.other = Confirmations(other, rate=rate, num_prior=num_prior)

    def observe(self, window_length: int, num_matched: int, num_proposed: int) -> None:
        """Learn from a window."""
        if num_proposed:
            self.proposed.observe(num_proposed + 1, min(num_matched, num_proposed))
        else:
            self.other.observe(window_length, num_matched)


class GatedLengths:
    """Chooses the gated blocks of a step and learns from its outcome.

    Args:
        rules: of the adapter.
        step_times: expected time of a step; None: blocks of the largest size behind all lengths.
        max_window: longest window of any request.
    """

    def __init__(self, rules: GatedRules, step_times: StepTimes | None, max_window: int) -> None:
        self.rules = rules
        self._step_times = step_times
        self._shared = _Learnt(
            [_INITIAL_PROPOSED] * rules.max_size,
            [_INITIAL_OTHER] * (max_window - 1),
            rate=_SHARED_RATE,
            num_prior=_SHARED_PRIOR_WINDOWS,
        )
        self._by_request: dict[str, _Learnt] = {}
        self._num_steps = 0

    @property
    def explores_next(self) -> bool:
        """Whether the next choice may have blocks in order to learn, rather than for what is known."""
        return (self._num_steps + 1) % EXPLORE_EVERY == 0

    def longest_window(self, num_proposed: int, max_window: int) -> int:
        """Tokens of a request's next window, at most; a window of proposals has no others."""
        if num_proposed:
            return min(num_proposed + 1, max_window)
        return 1 if self.rules.form == "two_pass" else max_window

    def choose(self, rows: Sequence[GatedRow], *, num_tokens: int, max_tokens: int) -> dict[str, GatedBlocks]:
        """Blocks by request; requests without any are left out.

        Args:
            rows: requests that may have some.
            num_tokens: of the step without them.
            max_tokens: of the step with them.
        """
        waiting = [row for row in rows if not (self.rules.form == "two_pass" and row.num_proposed)]
        if not waiting:
            return {}
        size, most = self._best_shape(waiting, num_tokens)
        self._num_steps += 1
        turn, rest = divmod(self._num_steps, EXPLORE_EVERY)
        chosen, left = {}, max_tokens - num_tokens
        for index, row in enumerate(waiting):
            explores = rest == 0 and turn % len(waiting) == index
            blocks = self._blocks(row, self.rules.max_size if explores else size, max(most, 2) if explores else most)
            blocks = None if blocks is None else blocks.within(left)
            if blocks is not None:
                chosen[row.request_id] = blocks
                left -= blocks.num_tokens
        return chosen

    def observe_window(self, request_id: str, window_length: int, num_matched: int, num_proposed: int) -> None:
        """Learn from a request's window: its draft tokens that were confirmed, and those that had been proposed."""
        own = self._by_request.get(request_id)
        if own is None:
            shared = self._shared
            own = _Learnt(
                shared.proposed.given_previous, shared.other.given_previous, rate=_REQUEST_RATE, num_prior=float("inf")
            )
            self._by_request[request_id] = own
        for learnt in (own, self._shared):
            learnt.observe(window_length, num_matched, num_proposed)

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request that ended."""
        self._by_request.pop(request_id, None)

    def _of(self, request_id: str) -> _Learnt:
        return self._by_request.get(request_id, self._shared)

    def _blocks(self, row: GatedRow, size: int, most: int) -> GatedBlocks | None:
        """Behind the `most` likeliest lengths of a row's window, within the output that is still wanted."""
        form = self.rules.form
        lengths = [0] if form in ("jacobi", "two_pass") else self._likeliest(row)[:most]
        # The last proposal is for the last token wanted; of one token more there is no draft.
        size = min(size, row.num_left - 2)
        lengths = [length for length in lengths if length + size < row.num_left]
        if size < 1 or not lengths:
            return None
        return GatedBlocks(self.rules.adapter_id, tuple(lengths), size, reads_draft=form in ("jacobi", "tail"))

    def _likeliest(self, row: GatedRow) -> list[int]:
        """Draft tokens that may be accepted of a row's window, the likeliest number first."""
        learnt = self._of(row.request_id)
        given = (learnt.proposed if row.num_proposed else learnt.other).given_previous[: row.window - 1]
        chances = _chances_of_lengths(np.array([given], dtype=np.float64))[0]
        return [int(length) for length in np.argsort(-chances, kind="stable")]

    def _best_shape(self, rows: Sequence[GatedRow], num_tokens: int) -> tuple[int, int]:
        """Size of blocks, and their number, that accept the most tokens per second in the long run; number 0: none."""
        max_size = self.rules.max_size
        if self._step_times is None:
            return max_size, max(row.window for row in rows)
        table = self._step_times.table()
        proposed = np.array([self._of(row.request_id).proposed.given_previous for row in rows])
        others = np.array([self._beyond_first_of_others(row) for row in rows])
        num_windows = sum(row.window for row in rows)
        num_fixed = num_tokens - num_windows  # of rows that have no say in it
        best_rate = (len(rows) + others.sum()) / _seconds(table, num_tokens)
        best = (1, 0)
        for size in range(1, max_size + 1):
            coverage, num_rows = self._coverage(proposed[:, :size])
            beyond_first = np.cumprod(proposed[:, :size], axis=1).sum(axis=1)[:, None]
            accepted = (1 + coverage * beyond_first + (1 - coverage) * others[:, None]).sum(axis=0)
            rates = accepted / _seconds(table, num_fixed + len(rows) * (1 + num_rows) + size * coverage.sum(axis=0))
            number = int(np.argmax(rates))
            if rates[number] > best_rate:
                best_rate, best = rates[number], (size, number + 1)
        return best

    def _coverage(self, given: Floats) -> tuple[Floats, Floats]:
        """For 1, 2, ... blocks: the share of windows that find proposals, [rows, blocks], and rows of blocks a window.

        Args:
            given: [rows, size], chances of depths given the ones before.
        """
        size = given.shape[1]
        if self.rules.form == "jacobi":
            return np.ones((len(given), 1)), np.array([float(size)])
        if self.rules.form == "two_pass":
            return np.full((len(given), 1), 0.5), np.array([size / 2])
        chances = np.sort(_chances_of_lengths(given), axis=1)[:, ::-1]
        return np.cumsum(chances, axis=1), size * np.arange(1.0, size + 2)

    def _beyond_first_of_others(self, row: GatedRow) -> float:
        """Draft tokens that a window without proposals accepts."""
        window = row.window if not row.num_proposed else self.rules.max_size + 1
        return float(np.cumprod(self._of(row.request_id).other.given_previous[: window - 1]).sum())


def _chances_of_lengths(given: Floats) -> Floats:
    """[rows, depths] chances of each depth given the one before to those of 0..depths accepted, [rows, depths + 1]."""
    reached = np.concatenate([np.ones((len(given), 1)), np.cumprod(given, axis=1)], axis=1)
    reached[:, :-1] -= reached[:, 1:]
    return reached


def _seconds(table: Floats, num_tokens: float | Floats) -> Floats:
    """Expected time of steps, also between whole numbers of tokens and, at the last one's, beyond the table."""
    return np.asarray(np.interp(num_tokens, np.arange(len(table)), table))
