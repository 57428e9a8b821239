"""Counts on hand-made trajectories. Letters stand for tokens; x is a wrong guess."""

import pytest

from cllm_core.evaluation.trajectory import (
    Iteration,
    TokenState,
    Trajectory,
    count_fast_forwarded,
    count_stationary,
    repetition_rate,
    settled_at,
    token_states,
)


def make_trajectory(output: str, *iterations: tuple[str, int]) -> Trajectory:
    """Each iteration as (draft, accepted); positions follow."""
    made, position = [], 0
    for draft, accepted in iterations:
        made.append(Iteration(position, tuple(map(ord, draft)), accepted, has_prompt=position == 0))
        position += accepted
    return Trajectory(tuple(map(ord, output)), tuple(made))


DOCUMENTED = make_trajectory("abcdef", ("xxc", 1), ("bcx", 3), ("exx", 2))


def test_the_documented_example_counts_as_documented() -> None:
    assert count_fast_forwarded(DOCUMENTED) == 3
    assert count_stationary(DOCUMENTED) == 1
    assert settled_at(DOCUMENTED) == [0, 1, 1, 1, 2, 2]


def test_plain_decoding_counts_nothing() -> None:
    trajectory = make_trajectory("abc", ("", 1), ("", 1), ("", 1))
    assert count_fast_forwarded(trajectory) == count_stationary(trajectory) == 0


@pytest.mark.parametrize(
    ("iterations", "stationary"),
    [
        ((("xxc", 1), ("xcx", 1), ("cxx", 2)), 1),  # c right three times, accepted as a draft
        ((("xxc", 1), ("xxx", 1), ("cxx", 2)), 0),  # c was lost on the way
        ((("xxc", 1), ("bxx", 2), ("dxx", 1)), 0),  # c was lost, and accepted as the token after the match
        ((("abc", 4),), 0),  # right at once: fast-forwarded, never behind a wrong token
        ((("xbc", 1), ("bcx", 3)), 2),
        ((("xxc", 1), ("b", 1), ("cxx", 2)), 1),  # a shorter window in between hides c but does not change it
    ],
)
def test_a_token_is_stationary_if_it_stays_right_from_behind_a_wrong_one(
    iterations: tuple[tuple[str, int], ...], stationary: int
) -> None:
    assert count_stationary(make_trajectory("abcd", *iterations)) == stationary


def test_prefill_is_the_passes_that_read_the_prompt() -> None:
    trajectory = make_trajectory("abcd", ("axx", 2), ("cxx", 2))
    assert (trajectory.num_prefill_passes, trajectory.num_prefill_tokens) == (1, 2)


def test_states_tell_what_each_iteration_saw() -> None:
    settled, accepted, right, wrong, outside = TokenState
    assert token_states(DOCUMENTED) == [
        [accepted, wrong, right, outside, outside, outside],
        [settled, accepted, accepted, accepted, outside, outside],
        [settled, settled, settled, settled, accepted, accepted],
    ]


@pytest.mark.parametrize(("text", "rate"), [("abcdefg", 0), ("aaaaaaaa", 0.8), ("abcdabcd", 0.2), ("abc", 0), ("", 0)])
def test_repetition_is_the_share_of_four_grams_seen_before(text: str, rate: float) -> None:
    assert repetition_rate(list(map(ord, text))) == pytest.approx(rate)
