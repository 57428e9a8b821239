"""StepDeadline: how long a step may take before it counts as hung. Host only, no torch."""

import math
import time
from collections.abc import Callable

from cllm_core.engine.step_times import StepTimes

# Generous: a wrong alarm costs every running request, a late one a few seconds.
_TIMES_EXPECTED = 20.0
_MIN_SECONDS = 1.5
# Without measured step times.
_UNMEASURED_SECONDS = 60.0
# Steps that compile kernels, capture graphs, or read weights back from a disk after a pause.
COLD_SECONDS = 300.0
_NUM_COLD_STEPS = 4
_PAUSE_SECONDS = 30.0


class StepDeadline:
    """Chosen from measured step times, rounded up so that it changes seldom.

    Args:
        step_timeout: fixed seconds instead; 0 sets no deadline, None measures.
        step_times: expected time of a step, None where nothing measures it.
        clock: the time in seconds.
    """

    def __init__(
        self,
        step_timeout: float | None,
        step_times: StepTimes | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step_timeout = step_timeout
        self._step_times = step_times
        self._clock = clock
        self._num_warm_steps = 0  # since the start or the last pause
        self._last_step_at = -math.inf

    def on_step(self) -> None:
        """Count a step that was computed."""
        if self._is_after_pause():
            self._num_warm_steps = 0
        self._num_warm_steps += 1
        self._last_step_at = self._clock()

    def seconds(self, num_tokens: int, *, is_cold: bool = False) -> float:
        """Of the next step; infinite where there is no deadline.

        Args:
            num_tokens: the most that the step may compute.
            is_cold: whether the step may compile or capture something.
        """
        if self._step_timeout == 0:
            return math.inf
        is_cold = is_cold or self._num_warm_steps < _NUM_COLD_STEPS or self._is_after_pause()
        if self._step_timeout is not None:
            usual = self._step_timeout
        elif self._step_times is None:
            usual = _UNMEASURED_SECONDS
        else:
            usual = _round_up(_TIMES_EXPECTED * self._step_times.seconds(num_tokens))
        return max(usual, COLD_SECONDS) if is_cold else usual

    def _is_after_pause(self) -> bool:
        return self._clock() - self._last_step_at > _PAUSE_SECONDS


def _round_up(seconds: float) -> float:
    """To the next of 1.5, 3, 6, ... seconds."""
    return _MIN_SECONDS * 2.0 ** max(0, math.ceil(math.log2(max(seconds, 1e-9) / _MIN_SECONDS)))
