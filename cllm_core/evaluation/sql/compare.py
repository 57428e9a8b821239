"""When two results of a query are the same."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from cllm_core.evaluation.sql.database import Result, SqlValue

Content = frozenset[tuple[SqlValue, int]]

_SIGNIFICANT_DIGITS = 9  # sums in another order differ in the last of a float's 15 digits
_MAX_PERMUTATIONS = 5_000  # of columns that hold the same values; beyond it, wide results count as different


def same_result(gold: Result, predicted: Result, *, ordered: bool) -> bool:
    """Whether the results hold the same rows, as often, whatever the order of the columns.

    Numbers are equal to nine significant digits. No row at all equals rows of nothing but NULL, which is how `max`
    and `ORDER BY ... LIMIT 1` differ where nothing is found.

    Args:
        gold: what is right.
        predicted: what is judged.
        ordered: whether the order of the rows counts.
    """
    if _is_nothing(gold) or _is_nothing(predicted):
        return _is_nothing(gold) and _is_nothing(predicted)
    if len(gold) != len(predicted) or len(gold[0]) != len(predicted[0]):
        return False
    gold_columns, predicted_columns = _columns(gold), _columns(predicted)
    if ordered:
        return Counter(gold_columns) == Counter(predicted_columns)
    gold_contents, predicted_contents = list(map(_content, gold_columns)), list(map(_content, predicted_columns))
    if Counter(gold_contents) != Counter(predicted_contents):
        return False
    gold_rows = Counter(zip(*gold_columns, strict=True))
    orders = _column_orders(gold_contents, predicted_contents)
    return any(
        Counter(zip(*(predicted_columns[index] for index in order), strict=True)) == gold_rows
        for order in islice(orders, _MAX_PERMUTATIONS)
    )


def _is_nothing(result: Result) -> bool:
    return all(value is None for row in result for value in row)


def _columns(result: Result) -> list[tuple[SqlValue, ...]]:
    return list(zip(*(map(_canonical, row) for row in result), strict=True))


def _canonical(value: SqlValue) -> SqlValue:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


def _content(column: tuple[SqlValue, ...]) -> Content:
    """What a column holds, whatever the order of the rows."""
    return frozenset(Counter(column).items())


def _column_orders(gold: Sequence[Content], predicted: Sequence[Content]) -> Iterator[list[int]]:
    """Orders of the predicted columns in which each holds what the gold column in its place holds.

    Both sides hold the same contents as often, so no choice leads into a dead end.
    """

    def extend(order: list[int]) -> Iterator[list[int]]:
        if len(order) == len(gold):
            yield order
            return
        for index, content in enumerate(predicted):
            if content == gold[len(order)] and index not in order:
                yield from extend([*order, index])

    return extend([])
