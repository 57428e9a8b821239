"""The queue refuses what is too much in all or for one user, and says when to come back by the pace of what ends."""

import pytest

from cllm_core.errors import EngineBusy
from cllm_core.worker.queue_limits import FinishPace, QueueLimits


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refusal(limits: QueueLimits, *, alive: int = 6, of_user: int = 0, user: str = "") -> EngineBusy:
    with pytest.raises(EngineBusy) as refused:
        limits.check(user, max_running=2, num_alive=alive, num_of_user=of_user)
    return refused.value


def test_one_more_than_run_and_wait_is_refused() -> None:
    limits = QueueLimits(max_waiting=4)
    limits.check("", max_running=2, num_alive=5, num_of_user=5)
    assert "6 requests are running or waiting already" in str(refusal(limits))


def test_a_user_may_have_a_share_and_nobody_in_particular_all() -> None:
    limits = QueueLimits(max_waiting=4, max_user_share=0.5)
    assert (limits.most("ann", 2), limits.most("", 2)) == (3, 6)
    limits.check("ann", max_running=2, num_alive=5, num_of_user=2)
    assert "this user has 3 requests" in str(refusal(limits, alive=3, of_user=3, user="ann"))
    limits.check("", max_running=2, num_alive=5, num_of_user=5)


def test_the_smallest_share_is_one_request() -> None:
    assert QueueLimits(max_waiting=0, max_user_share=0.01).most("ann", 2) == 1


def test_refused_requests_are_told_to_come_one_after_the_other_at_the_pace_of_what_ends() -> None:
    clock = Clock()
    limits = QueueLimits(max_waiting=4, pace=FinishPace(clock))
    assert refusal(limits).retry_after == 1.0
    limits.check("", max_running=2, num_alive=0, num_of_user=0)
    for _ in range(5):
        limits.on_end()
        clock.now += 3.0
    clock.now -= 3.0  # five ends, three seconds apart, the last one now
    assert [refusal(limits).retry_after for _ in range(3)] == [3.0, 6.0, 9.0]
    limits.check("", max_running=2, num_alive=0, num_of_user=0)
    assert refusal(limits).retry_after == 3.0
    clock.now += 100_000.0
    assert refusal(limits).retry_after == 60.0


def test_a_fast_pace_still_asks_for_a_second() -> None:
    clock = Clock()
    limits = QueueLimits(max_waiting=4, pace=FinishPace(clock))
    for _ in range(40):
        limits.on_end()
        clock.now += 0.001
    assert refusal(limits).retry_after == 1.0
