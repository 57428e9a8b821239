"""Times of kernels add up to shares and gaps."""

import pytest

from benchmarks.kernel_profile import summarize


def test_gaps_are_the_time_in_which_no_kernel_runs() -> None:
    found = summarize([(10.0, 12.0, "a"), (0.0, 4.0, "b"), (2.0, 6.0, "a")])
    assert (found.num_kernels, found.milliseconds) == (3, 0.012)
    assert found.gap_share == pytest.approx(4 / 12)
    assert [(one.name, one.calls) for one in found.longest] == [("a", 2), ("b", 1)]
    assert [one.share for one in found.longest] == [pytest.approx(6 / 12), pytest.approx(4 / 12)]


def test_no_kernels_take_no_time() -> None:
    assert summarize([]).num_kernels == 0
