"""When two results are the same."""

import pytest

from cllm_core.evaluation.sql.compare import same_result
from cllm_core.evaluation.sql.database import Result

Pair = tuple[Result, Result]


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ([(1, "a"), (2, "b")], [(2, "b"), (1, "a")]),
        ([(1, "a"), (2, "b")], [("a", 1), ("b", 2)]),
        ([(1, 2), (2, 1), (1, 1)], [(2, 1), (1, 2), (1, 1)]),
        ([(0.1 + 0.2,)], [(0.3,)]),
        ([(3,)], [(3.0,)]),
        ([], [(None,)]),
        ([(None, 1)], [(1, None)]),
    ],
)
def test_same_rows_in_any_order_of_rows_and_columns_match(gold: Result, predicted: Result) -> None:
    assert same_result(gold, predicted, ordered=False)


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ([(1,), (1,)], [(1,)]),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)]),
        ([(1, 2), (2, 1), (1, 1)], [(1, 1), (2, 2), (1, 1)]),
        ([(1, "a"), (2, "b")], [(1, "b"), (2, "a")]),
        ([(3,)], [("3",)]),
        ([(0,)], [(None,)]),
        ([(1.001,)], [(1.002,)]),
        ([], [(1,)]),
    ],
)
def test_other_rows_do_not_match(gold: Result, predicted: Result) -> None:
    assert not same_result(gold, predicted, ordered=False)


def test_the_order_of_rows_counts_only_where_asked() -> None:
    rows: Result = [(1, "a"), (2, "b")]
    assert same_result(rows, rows[::-1], ordered=False)
    assert not same_result(rows, rows[::-1], ordered=True)
    assert same_result(rows, [(text, number) for number, text in rows], ordered=True)


def test_many_equal_columns_are_compared_in_bounded_time() -> None:
    gold: Result = [(index,) * 12 for index in range(5)]
    assert same_result(gold, list(reversed(gold)), ordered=False)
    assert not same_result(gold, [(*row[:11], 9) for row in gold], ordered=False)
