"""How many tokens each Jacobi window of a step gets, so that the step accepts the most tokens per second.

A longer window may accept more, yet every token in it makes the step slower for all rows. Two estimates decide, both
kept current while the engine runs: the time of a step by its number of tokens, and per request how often a draft token
at each depth is confirmed. Alone on the device a row gets about its whole block; at saturation windows shrink to 1,
which is AR.

What is confirmed at a depth depends on the windows before, too: in a whole block, tokens become right while they wait
for their turn, which a window cut short takes from them. So blocks that stay whole are judged by themselves, by the
tokens they accept, and windows cut to measure by what such windows confirm. Host only, no torch.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Where no window has been seen yet: chance that a draft token is confirmed, given that the one before it was.
_INITIAL_CONFIRMATION = 0.8
# Weights of a new observation in the running means. What all requests share starts as a plain mean, in which the
# initial guess counts as so many windows, so that the first request on a plain model is the last to draft in vain.
_REQUEST_RATE = 0.15
_SHARED_RATE = 0.02
_SHARED_PRIOR_WINDOWS = 8
_TIME_RATE_NEAR = 0.15
_TIME_RATE_ALL = 0.1
# Whole blocks in a row after which what they accept shows what whole blocks are worth.
_SETTLED = 3
# A step further off the expected time than this factor is a hiccup of the machine.
_MAX_SURPRISE = 4.0
# In one step of so many, one row's draft counts as certain: depths that are never tried are never learnt. Counted in
# steps, so that it costs a full batch little, and short requests, which share what they learn, have their turn.
EXPLORE_EVERY = 24


class StepTimes:
    """Expected seconds of a step by its number of tokens: linear between knots, which follow what is observed.

    Args:
        measured: number of tokens -> seconds, of at least one size.
        max_tokens: most tokens of a step.
    """

    def __init__(self, measured: Mapping[int, float], max_tokens: int) -> None:
        self._knots = np.unique([1, *(2**i for i in range(max_tokens.bit_length())), max_tokens])
        tokens = np.array(sorted(measured))
        seconds = np.maximum.accumulate([measured[count] for count in sorted(measured)])
        slope = (seconds[-1] - seconds[0]) / max(1, tokens[-1] - tokens[0])
        beyond = seconds[-1] + slope * (self._knots - tokens[-1])
        self._knot_seconds = np.where(self._knots > tokens[-1], beyond, np.interp(self._knots, tokens, seconds))
        self._all_tokens = np.arange(max_tokens + 1)
        self._refresh()

    def seconds(self, num_tokens: int) -> float:
        """Expected time of a step of this many tokens."""
        return float(self._table[num_tokens])

    def table(self) -> Floats:
        """Expected time of steps of 0..max_tokens tokens; [max_tokens + 1], never falling."""
        return self._table

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step: knots next to it most, and all of them a little, since machines speed up and slow down."""
        surprise = np.clip(seconds / self.seconds(num_tokens), 1 / _MAX_SURPRISE, _MAX_SURPRISE) - 1
        right = int(np.searchsorted(self._knots, num_tokens, side="right"))
        rates = np.full(len(self._knots), _TIME_RATE_ALL)
        rates[right - 1 : right + 1] = _TIME_RATE_NEAR
        self._knot_seconds *= 1 + rates * surprise
        self._refresh()

    def _refresh(self) -> None:
        rising = np.maximum.accumulate(self._knot_seconds)
        self._table = np.interp(self._all_tokens, self._knots, rising)


class Confirmations:
    """How often draft tokens are confirmed, by depth 1, 2, ...; running means.

    What is kept is the chance of a depth given that the depth before it was confirmed: a window says nothing about
    depths behind its first wrong token or its end, and a mean over all windows would take short ones for failures.

    Args:
        given_previous: [longest window - 1], where to start from; copied.
        rate: weight of a new observation.
        num_prior: observations that the start counts as; a depth with few observations learns faster than at `rate`.
    """

    def __init__(self, given_previous: Floats, *, rate: float, num_prior: float = float("inf")) -> None:
        self.given_previous = given_previous.copy()
        self._rate = rate
        self._num_seen = np.full(len(given_previous), num_prior)

    @property
    def chances(self) -> Floats:
        """Chance that at least so many draft tokens are confirmed, by depth; falling."""
        return np.cumprod(self.given_previous, dtype=np.float64)

    def observe(self, window_length: int, num_matched: int) -> None:
        """Learn from a window of which `num_matched` draft tokens were confirmed."""
        num_tried = min(num_matched + 1, window_length - 1)
        self._num_seen[:num_tried] += 1
        rates = np.maximum(self._rate, 1 / self._num_seen[:num_tried])
        given = self.given_previous[:num_tried]
        given[:] = given + rates * ((np.arange(len(given)) < num_matched) - given)


class Mean:
    """A running mean of which the first value counts as some observations."""

    def __init__(self, value: float, *, rate: float, num_prior: float = float("inf")) -> None:
        self.value = value
        self._rate, self._num_seen = rate, num_prior

    def observe(self, value: float) -> None:
        """Learn from an observation."""
        self._num_seen += 1
        self.value += max(self._rate, 1 / self._num_seen) * (value - self.value)


class _Learnt:
    """What is known of one request.

    Attributes:
        cut: of windows cut to measure.
        whole: tokens accepted by a whole block after whole blocks.
        num_whole: whole blocks in a row, up to now.
    """

    def __init__(self, shared_cut: Confirmations, shared_whole: Mean) -> None:
        self.cut = Confirmations(shared_cut.given_previous, rate=_REQUEST_RATE)
        self.whole = Mean(shared_whole.value, rate=_REQUEST_RATE)
        self.num_whole = 0


class DraftLengths:
    """Chooses the window lengths of a step and learns from its outcome.

    Args:
        step_times: expected time of a step.
        max_window: longest window of any request.
    """

    def __init__(self, step_times: StepTimes, max_window: int) -> None:
        self._step_times = step_times
        self._shared = Confirmations(
            np.full(max_window - 1, _INITIAL_CONFIRMATION), rate=_SHARED_RATE, num_prior=_SHARED_PRIOR_WINDOWS
        )
        self._shared_whole = Mean(
            1 + float(self._shared.chances.sum()), rate=_SHARED_RATE, num_prior=_SHARED_PRIOR_WINDOWS
        )
        self._by_request: dict[str, _Learnt] = {}
        self._num_steps = 0

    def choose(
        self, max_windows: Mapping[str, int], max_tokens: int, num_forced: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Window length per request, each at least 1.

        Tokens are added in the order of their chance to be accepted - within a row that is the order of depth - and
        their best number is where accepted tokens per second peak.

        Args:
            max_windows: request id -> longest window it may have, at least 1.
            max_tokens: sum of the windows; at least the number of requests.
            num_forced: request id -> draft tokens at the head that a grammar forces, of those that have any.
        """
        if not max_windows:
            return {}
        forced = num_forced or {}
        explorer = self._next_explorer(len(max_windows))
        chances = [
            np.ones(longest - 1)
            if row == explorer
            else self._row_chances(request_id, longest, forced.get(request_id, 0))
            for row, (request_id, longest) in enumerate(max_windows.items())
        ]
        num_rows, best = len(chances), np.sort(np.concatenate(chances))[::-1][: max_tokens - len(chances)]
        accepted = num_rows + np.concatenate([[0.0], np.cumsum(best)])
        rates = accepted / self._step_times.table()[num_rows : num_rows + len(accepted)]
        num_added = int(np.argmax(rates))
        if self._whole_rate(max_windows, max_tokens, forced) > rates[num_added]:
            return dict(max_windows)
        if num_added == 0:
            return dict.fromkeys(max_windows, 1)
        threshold = best[num_added - 1]
        lengths = [1 + int(np.count_nonzero(row > threshold)) for row in chances]
        # Equally likely tokens stand at the threshold; the oldest rows get them, in the order given.
        spare = num_rows + num_added - sum(lengths)
        for index, row in enumerate(chances):
            taken = min(spare, int(np.count_nonzero(row == threshold)))
            lengths[index] += taken
            spare -= taken
        return dict(zip(max_windows, lengths, strict=True))

    def observe_window(
        self, request_id: str, window_length: int, num_matched: int, *, num_forced: int = 0, is_whole: bool = False
    ) -> None:
        """Learn from one request's window.

        Args:
            request_id: of its request.
            window_length: tokens of the window.
            num_matched: draft tokens confirmed.
            num_forced: draft tokens at the head that were no guesses.
            is_whole: whether the window was the request's whole block.
        """
        num_forced = min(num_forced, window_length - 1)
        if num_matched < num_forced:  # the model spelled the forced text otherwise: what stood behind it was not tried
            return
        own = self._by_request.get(request_id)
        if own is None:
            own = self._by_request[request_id] = _Learnt(self._shared, self._shared_whole)
        own.num_whole = own.num_whole + 1 if is_whole else 0
        window_length, num_matched = window_length - num_forced, num_matched - num_forced
        if own.num_whole >= _SETTLED:
            own.whole.observe(1 + num_matched)
            self._shared_whole.observe(1 + num_matched)
        else:
            own.cut.observe(window_length, num_matched)
            self._shared.observe(window_length, num_matched)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Learn from the time of a step."""
        self._step_times.observe(num_tokens, seconds)

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request that ended."""
        self._by_request.pop(request_id, None)

    def _next_explorer(self, num_rows: int) -> int | None:
        """The row that gets its full window in this step; they take turns."""
        self._num_steps += 1
        turn, rest = divmod(self._num_steps, EXPLORE_EVERY)
        return None if rest else turn % num_rows

    def _row_chances(self, request_id: str, longest: int, num_forced: int = 0) -> Floats:
        """Chances of a row's depths, falling; forced ones are certain."""
        own = self._by_request.get(request_id)
        cut = self._shared if own is None else own.cut
        return np.concatenate([np.ones(num_forced), cut.chances])[: longest - 1]

    def _whole_rate(self, max_windows: Mapping[str, int], max_tokens: int, num_forced: Mapping[str, int]) -> float:
        """Expected accepted tokens per second if every row gets its whole block; 0 where they do not fit."""
        num_tokens = sum(max_windows.values())
        if num_tokens > max_tokens:
            return 0.0
        accepted = 0.0
        for request_id, longest in max_windows.items():
            own = self._by_request.get(request_id)
            whole = self._shared_whole if own is None else own.whole
            accepted += min(longest, num_forced.get(request_id, 0) + whole.value)
        return accepted / self._step_times.seconds(num_tokens)
