"""StepTimes: how long a step takes by its number of tokens. Measured at start, kept current while the engine runs.

Window lengths and prompt chunks are chosen by it. Host only, no torch.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Weights of a new observation in the running means.
_TIME_RATE_NEAR = 0.15
_TIME_RATE_ALL = 0.1
# A step further off the expected time than this factor is an outlier of the machine.
_MAX_SURPRISE = 4.0


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
        self._table: Floats | None = None  # made when it is asked for: many steps are observed, few chosen by it

    def seconds(self, num_tokens: int) -> float:
        """Expected time of a step of this many tokens."""
        return float(np.interp(num_tokens, self._knots, np.maximum.accumulate(self._knot_seconds)))

    def table(self) -> Floats:
        """Expected time of steps of 0..max_tokens tokens; [max_tokens + 1], never falling."""
        if self._table is None:
            rising = np.maximum.accumulate(self._knot_seconds)
            self._table = np.interp(self._all_tokens, self._knots, rising)
        return self._table

    def num_tokens_within(self, seconds: float) -> int:
        """The largest step expected to take at most this long, in tokens; 0 where every step takes longer."""
        return max(0, int(np.searchsorted(self.table(), seconds, side="right")) - 1)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step: knots next to it most, and all of them a little, since machines speed up and slow down."""
        surprise = min(max(seconds / self.seconds(num_tokens), 1 / _MAX_SURPRISE), _MAX_SURPRISE) - 1
        right = int(np.searchsorted(self._knots, num_tokens, side="right"))
        self._knot_seconds *= 1 + _TIME_RATE_ALL * surprise
        self._knot_seconds[right - 1 : right + 1] *= (1 + _TIME_RATE_NEAR * surprise) / (1 + _TIME_RATE_ALL * surprise)
        self._table = None
