"""The fixed-point test, against its definition."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cllm_core.engine.jacobi import count_matched

tokens = st.integers(0, 1)
rows = st.integers(1, 6).flatmap(
    lambda n: st.tuples(st.lists(tokens, min_size=n, max_size=n), st.lists(tokens, min_size=n, max_size=n))
)


def matched_by_definition(window: list[int], predicted: list[int]) -> int:
    """The longest draft prefix of which every token is the prediction before it."""
    count = 0
    while count < len(window) - 1 and window[count + 1] == predicted[count]:
        count += 1
    return count


@given(st.lists(rows, min_size=1, max_size=5), st.integers(0, 1))
def test_ragged_windows_match_as_each_would_alone(windows: list[tuple[list[int], list[int]]], padding: int) -> None:
    width = max(len(window) for window, _ in windows)
    padded = torch.tensor([[row + [padding] * (width - len(row)) for row in pair] for pair in windows])
    lengths = torch.tensor([len(window) for window, _ in windows])
    matched = count_matched(padded[:, 0], padded[:, 1], lengths)
    assert matched.tolist() == [matched_by_definition(window, predicted) for window, predicted in windows]


def test_a_lone_last_token_matches_nothing() -> None:
    assert count_matched(torch.tensor([[7]]), torch.tensor([[7]]), torch.tensor([1])).tolist() == [0]


def test_a_token_right_behind_a_wrong_one_does_not_count() -> None:
    window, predicted = torch.tensor([[1, 2, 9, 4]]), torch.tensor([[2, 3, 4, 5]])
    assert count_matched(window, predicted, torch.tensor([4])).tolist() == [1]
