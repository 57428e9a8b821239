"""How many tokens each Jacobi window of a step gets, so that the step accepts the most tokens per second.

A longer window may accept more, yet every token in it makes the step slower for all rows. Two estimates decide, both
kept current while the engine runs: the time of a step by its number of tokens (StepTimes), and per request how often a
draft token at each depth is confirmed. Alone on the device a row gets about its whole block; at saturation windows
shrink to 1, which is AR.

What is confirmed at a depth depends on the windows before, too: tokens become right while they wait in a long window,
which a short one takes from them. So steps in which one *cap* bounds all windows are judged by what windows accept
after windows under the same cap; windows cut to measure, by the chances of each row's depths.
Host only, no torch.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from cllm_core.engine.step_times import Floats, StepTimes

# Where no window has been seen yet: chance that a draft token is confirmed, given that the one before it was.
_INITIAL_CONFIRMATION = 0.8
# Weights of a new observation in the running means. What all requests share starts as a plain mean, in which the
# initial guess counts as so many windows, so that the first request on a plain model is the last to draft in vain.
_REQUEST_RATE = 0.15
_SHARED_RATE = 0.02
_SHARED_PRIOR_WINDOWS = 8
# Windows under one cap in a row after which what they accept shows what the cap is worth.
_SETTLED = 3
# How much more or less than the others a request may be expected to accept.
_MAX_KEENNESS = 4.0
# In one step of so many, one row's draft counts as certain: depths that are never tried are never learnt. Counted in
# steps, so that it costs a full batch little, and short requests, which share what they learn, have their turn.
EXPLORE_EVERY = 24
# And once in so many steps the next longer or shorter cap is tried until it has settled.
TRY_CAP_EVERY = 256


class Confirmations:
    """How often draft tokens are confirmed, by depth 1, 2, ...; running means.

    What is kept is the chance of a depth given that the depth before it was confirmed: a window says nothing about
    depths behind its first wrong token or its end, and a mean over all windows would take short ones for failures.

    Args:
        given_previous: by depth, as many as the longest window has; where to start from; copied.
        rate: weight of a new observation.
        num_prior: observations that the start counts as; a depth with few observations learns faster than at `rate`.
    """

    def __init__(self, given_previous: Sequence[float], *, rate: float, num_prior: float = float("inf")) -> None:
        self.given_previous = list(given_previous)  # an array is slower for the few depths that a window has tried
        self._rate = rate
        self._num_seen = [num_prior] * len(self.given_previous)

    def observe(self, window_length: int, num_matched: int) -> None:
        """Learn from a window of which `num_matched` draft tokens were confirmed."""
        for depth in range(min(num_matched + 1, window_length - 1)):
            self._num_seen[depth] += 1
            rate = max(self._rate, 1 / self._num_seen[depth])
            self.given_previous[depth] += rate * ((depth < num_matched) - self.given_previous[depth])


class Caps:
    """Tokens that a window accepts under each cap, after windows under the same cap; running means.

    Args:
        max_window: longest window of any request.
    """

    def __init__(self, max_window: int) -> None:
        self.lengths = 2 ** np.arange(1, max(2, (max_window - 1).bit_length() + 1))
        chances = _INITIAL_CONFIRMATION ** np.arange(1, self.lengths[-1])
        self._prior = 1 + np.cumsum(chances)[self.lengths - 2]
        self._means = self._prior.copy()
        self._num_seen = np.zeros(len(self.lengths))

    def index_of(self, window_length: int, block_length: int) -> int | None:
        """The cap that a window of a request has, None where it has none; a whole block has the first that holds it."""
        if block_length == 1:
            return None
        index = int(np.searchsorted(self.lengths, min(window_length, block_length)))
        return index if window_length >= block_length or self.lengths[index] == window_length else None

    def accepted(self) -> Floats:
        """Expected tokens by cap. One never tried is taken to fall short of its prior as the nearest one tried does."""
        tried = np.flatnonzero(self._num_seen)
        if not len(tried):
            return self._prior
        nearest = tried[np.abs(tried - np.arange(len(self.lengths))[:, None]).argmin(axis=1)]
        shortfall = (self._means - 1) / (self._prior - 1)
        expected: Floats = 1 + (self._prior - 1) * shortfall[nearest]
        return expected

    def accepted_under(self, index: int) -> float:
        """The same for one cap."""
        return float(self._means[index] if self._num_seen[index] else self.accepted()[index])

    def observe(self, index: int, num_accepted: int) -> None:
        """Learn from a window under a cap that has settled."""
        self._means[index] = self.accepted_under(index)
        self._num_seen[index] += 1
        rate = max(_SHARED_RATE, 1 / (self._num_seen[index] + _SHARED_PRIOR_WINDOWS))
        self._means[index] += rate * (num_accepted - self._means[index])


class _Learnt:
    """What is known of one request.

    Attributes:
        cut: of windows cut to measure.
        keenness: tokens it accepts beyond the first, over those of all requests under the same cap.
        cap: index of its last window's, None for none.
        num_under_cap: windows under that cap in a row.
    """

    def __init__(self, shared_cut: Confirmations) -> None:
        self.cut = Confirmations(shared_cut.given_previous, rate=_REQUEST_RATE)
        self.keenness = 1.0
        self.cap: int | None = None
        self.num_under_cap = 0

    def settle(self, cap: int | None) -> bool:
        """Note the cap of a window; whether what the window accepts shows what the cap is worth."""
        self.num_under_cap = self.num_under_cap + 1 if cap == self.cap else 1
        self.cap = cap
        return cap is not None and self.num_under_cap >= _SETTLED


class DraftLengths:
    """Chooses the window lengths of a step and learns from its outcome.

    Args:
        step_times: expected time of a step.
        max_window: longest window of any request.
    """

    def __init__(self, step_times: StepTimes, max_window: int) -> None:
        self._step_times = step_times
        self._shared = Confirmations(
            [_INITIAL_CONFIRMATION] * (max_window - 1), rate=_SHARED_RATE, num_prior=_SHARED_PRIOR_WINDOWS
        )
        self._caps = Caps(max_window)
        self._by_request: dict[str, _Learnt] = {}
        self._num_steps = 0
        self._trial = _Trial()

    def choose(
        self, max_windows: Mapping[str, int], max_tokens: int, num_forced: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Window length per request, each at least 1.

        Tokens are added in the order of their chance to be accepted - within a row that is the order of depth - and
        their best number is where accepted tokens per second peak.

        Args:
            max_windows: request id -> longest window it may have, at least 1; also of those whose prompt is being read,
                so that many that come at once leave each other room.
            max_tokens: sum of the windows; at least the number of requests.
            num_forced: request id -> draft tokens at the head that a grammar forces, of those that have any.
        """
        if max(max_windows.values(), default=1) == 1:
            return dict(max_windows)
        forced = num_forced or {}
        lengths, rate = self._cut_to_measure(max_windows, max_tokens, forced)
        cap_rates = self._cap_rates(max_windows, max_tokens, forced)
        best = int(np.argmax(cap_rates))
        chosen = best if cap_rates[best] > rate else None
        cap = self._trial.next_cap(chosen, typical_length=sum(lengths.values()) / len(lengths), rates=cap_rates)
        if cap is None:
            return lengths
        return {request_id: min(int(self._caps.lengths[cap]), longest) for request_id, longest in max_windows.items()}

    @property
    def explores_next(self) -> bool:
        """Whether the next choice may lengthen windows in order to learn, rather than for what is known."""
        return (self._num_steps + 1) % EXPLORE_EVERY == 0 or self._trial.is_due

    def _cut_to_measure(
        self, max_windows: Mapping[str, int], max_tokens: int, forced: Mapping[str, int]
    ) -> tuple[dict[str, int], float]:
        """Windows by the chances of each row's depths, and accepted tokens per second."""
        num_rows = len(max_windows)
        chances = self._chances_of_depths(max_windows, forced, self._next_explorer(num_rows))
        best = np.sort(chances, axis=None)[::-1][: max_tokens - num_rows]
        accepted = num_rows + np.concatenate([[0.0], np.cumsum(best)])
        rates = accepted / self._step_times.table()[num_rows : num_rows + len(accepted)]
        num_added = int(np.argmax(rates))
        rate = float(rates[num_added])
        if num_added == 0:
            return dict.fromkeys(max_windows, 1), rate
        threshold = best[num_added - 1]
        num_above = np.count_nonzero(chances > threshold, axis=1)
        # Equally likely tokens stand at the threshold; the oldest rows get them, in the order given.
        num_equal = np.count_nonzero(chances == threshold, axis=1)
        given_before = np.cumsum(num_equal) - num_equal
        num_taken = np.clip(num_added - num_above.sum() - given_before, 0, num_equal)
        lengths = (1 + num_above + num_taken).tolist()
        return dict(zip(max_windows, lengths, strict=True)), rate

    def observe_window(
        self, request_id: str, window_length: int, num_matched: int, *, block_length: int, num_forced: int = 0
    ) -> None:
        """Learn from one request's window.

        Args:
            request_id: of its request.
            window_length: tokens of the window.
            num_matched: draft tokens confirmed.
            block_length: of the request.
            num_forced: draft tokens at the head that were no guesses.
        """
        num_forced = min(num_forced, window_length - 1)
        if num_matched < num_forced:  # the model spelled the forced text otherwise: what stood behind it was not tried
            return
        own = self._by_request.get(request_id)
        if own is None:
            own = self._by_request[request_id] = _Learnt(self._shared)
        cap = self._caps.index_of(window_length, block_length)
        window_length, num_matched = window_length - num_forced, num_matched - num_forced
        if own.settle(cap) and cap is not None:
            usual = self._caps.accepted_under(cap) - 1
            keenness = min(num_matched / usual, _MAX_KEENNESS) if usual > 0 else 1.0
            own.keenness += _REQUEST_RATE * (keenness - own.keenness)
            self._caps.observe(cap, 1 + num_matched)
        else:
            own.cut.observe(window_length, num_matched)
            self._shared.observe(window_length, num_matched)

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request that ended."""
        self._by_request.pop(request_id, None)

    def _next_explorer(self, num_rows: int) -> int | None:
        """The row that gets its full window in this step; they take turns."""
        self._num_steps += 1
        turn, rest = divmod(self._num_steps, EXPLORE_EVERY)
        return None if rest else turn % num_rows

    def _chances_of_depths(
        self, max_windows: Mapping[str, int], forced: Mapping[str, int], explorer: int | None
    ) -> Floats:
        """[number of rows, longest window - 1] chances, falling in each row; those forced and the explorer's are 1.

        0 behind the longest window of a row.
        """
        num_depths = max(max_windows.values()) - 1
        given = np.array([self._cut_of(request_id).given_previous[:num_depths] for request_id in max_windows])
        for row, request_id in enumerate(max_windows) if forced else ():
            num_forced = min(forced.get(request_id, 0), num_depths)
            given[row] = np.concatenate([np.ones(num_forced), given[row, : num_depths - num_forced]])
        if explorer is not None:
            given[explorer] = 1.0
        longest = np.array(list(max_windows.values()))
        return np.where(np.arange(num_depths) < longest[:, None] - 1, np.cumprod(given, axis=1), 0.0)

    def _cut_of(self, request_id: str) -> Confirmations:
        own = self._by_request.get(request_id)
        return self._shared if own is None else own.cut

    def _cap_rates(self, max_windows: Mapping[str, int], max_tokens: int, forced: Mapping[str, int]) -> Floats:
        """Expected accepted tokens per second under each cap; 0 where the windows do not fit."""
        longest = np.array(list(max_windows.values()))
        keenness = np.array([own.keenness if (own := self._by_request.get(r)) else 1.0 for r in max_windows])
        given = np.array([forced.get(request_id, 0) for request_id in max_windows])
        largest = np.searchsorted(self._caps.lengths, longest)  # the first cap that holds the row's longest window
        beyond_first = self._caps.accepted() - 1
        caps = np.arange(largest.max() + 1)[:, None]
        windows = np.minimum(self._caps.lengths[caps], longest)  # [caps, rows]
        accepted = np.minimum(windows, 1 + given + keenness * beyond_first[np.minimum(caps, largest)])
        num_tokens = windows.sum(axis=1)
        fitting = num_tokens <= max_tokens
        rates = np.zeros(len(self._caps.lengths))
        rates[: len(caps)][fitting] = accepted.sum(axis=1)[fitting] / self._step_times.table()[num_tokens[fitting]]
        return rates


class _Trial:
    """Tries, now and then, the cap next to the one in use: how much is accepted under it shows in no other way."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_left = 0
        self._cap = 0
        self._is_up = False

    @property
    def is_due(self) -> bool:
        """Whether the next step is one of a trial."""
        return self._num_left > 0 or (self._num_steps + 1) % TRY_CAP_EVERY == 0

    def next_cap(self, chosen: int | None, *, typical_length: float, rates: Floats) -> int | None:
        """The cap of a step.

        Args:
            chosen: index of the one that seems best, None where windows cut to measure do.
            typical_length: of these windows, in tokens.
            rates: by cap, 0 where it cannot be had.
        """
        self._num_steps += 1
        if self._num_steps % TRY_CAP_EVERY == 0:
            self._is_up = not self._is_up
            near = round(np.log2(typical_length)) - 1 if chosen is None else chosen
            self._cap = max(0, near + 1 if self._is_up else near - 1)
            self._num_left = _SETTLED + 2
        if self._num_left and self._cap < len(rates) and rates[self._cap]:
            self._num_left -= 1
            return self._cap
        return chosen
