import math

import pytest

from cllm_core.engine.step_deadline import COLD_SECONDS, StepDeadline
from cllm_core.engine.step_times import StepTimes


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_warm(step_timeout: float | None, step_times: StepTimes | None) -> tuple[StepDeadline, Clock]:
    clock = Clock()
    deadline = StepDeadline(step_timeout, step_times, clock)
    for _ in range(4):
        deadline.on_step()
    return deadline, clock


TIMES = StepTimes({1: 0.01, 100: 1.0}, max_tokens=1024)


def test_a_deadline_is_generous_and_grows_with_the_expected_time() -> None:
    deadline, _ = make_warm(None, TIMES)
    assert deadline.seconds(1) == 1.5
    for num_tokens in (10, 100, 1024):
        assert 20 <= deadline.seconds(num_tokens) / TIMES.seconds(num_tokens) <= 40


@pytest.mark.parametrize("step_timeout", [None, 2.0])
def test_first_steps_steps_after_a_pause_and_captures_may_take_long(step_timeout: float | None) -> None:
    deadline, clock = make_warm(step_timeout, TIMES)
    assert deadline.seconds(1) < COLD_SECONDS
    assert deadline.seconds(1, is_cold=True) == COLD_SECONDS
    clock.now += 60
    assert deadline.seconds(1) == COLD_SECONDS
    deadline.on_step()
    assert deadline.seconds(1) == COLD_SECONDS
    for _ in range(3):
        deadline.on_step()
    assert deadline.seconds(1) < COLD_SECONDS
    assert StepDeadline(step_timeout, TIMES).seconds(1) == COLD_SECONDS


def test_a_fixed_deadline_holds_for_every_step_and_zero_sets_none() -> None:
    fixed, _ = make_warm(7.0, TIMES)
    assert {fixed.seconds(num_tokens) for num_tokens in (1, 1024)} == {7.0}
    off, _ = make_warm(0.0, TIMES)
    assert off.seconds(1, is_cold=True) == math.inf


def test_without_measured_times_a_minute_is_allowed() -> None:
    unmeasured, _ = make_warm(None, None)
    assert unmeasured.seconds(1) == 60
