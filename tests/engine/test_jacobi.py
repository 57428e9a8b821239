"""The fixed-point test, against its definition."""

from hypothesis import given
from hypothesis import strategies as st

from cllm_core.engine.jacobi import count_matched

tokens = st.integers(0, 1)


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6))
def test_the_longest_prefix_that_the_predictions_repeat_is_counted(pairs: list[tuple[int, int]]) -> None:
    window, predicted = zip(*pairs, strict=True)
    expected = max(size for size in range(len(window)) if window[1 : 1 + size] == predicted[:size])
    assert count_matched(window, predicted) == expected


def test_a_lone_last_token_matches_nothing() -> None:
    assert count_matched([7], [7]) == 0


def test_a_token_right_behind_a_wrong_one_does_not_count() -> None:
    assert count_matched([1, 2, 9, 4], [2, 3, 4, 5]) == 1
