"""Execution match the test-suite way (Zhong et al. 2020, arXiv:2010.02840).

Gold query and prediction run on several generated databases and must agree on all of them. A database on which the
gold query itself answers otherwise once its rows are inserted in another order, or the ties of an ORDER BY are broken
otherwise, decides nothing and is passed over, unless all are such.
"""

import random

from cllm_core.errors import DataError
from cllm_core.evaluation.sql.compare import same_result
from cllm_core.evaluation.sql.database import Database, QueryFailed, Result
from cllm_core.evaluation.sql.layout import build_layout
from cllm_core.evaluation.sql.query_text import break_ties, is_ordered, read_hints
from cllm_core.evaluation.sql.rows import Row, generate_rows
from cllm_core.tasks.spider import Schema

# Small ones for results without ties, large ones for groups with many members.
DATABASE_SIZES = (4, 4, 8, 8, 16, 16, 30, 30, 60, 60)


class SqlJudge:
    """Knows one gold query and the databases it is tested on.

    Args:
        schema: of the databases.
        gold: the right query.
        seed: of the random rows.

    Raises:
        DataError: the gold query does not run.
    """

    def __init__(self, schema: Schema, gold: str, *, seed: int = 0) -> None:
        self._ordered = is_ordered(gold)
        hints = read_hints(gold, schema)
        self._layout = build_layout(schema, hints)
        cases = []
        for index, size in enumerate(DATABASE_SIZES):
            rows = generate_rows(self._layout, hints.literals, num_rows=size, seed=seed * len(DATABASE_SIZES) + index)
            cases.append((rows, *self._run_gold(gold, rows, seed)))
        decisive = [(rows, result) for rows, result, is_stable in cases if is_stable]
        self._cases: list[tuple[list[list[Row]], Result]] = decisive or [(rows, result) for rows, result, _ in cases]

    @property
    def num_found(self) -> int:
        """Databases on which the gold query finds something."""
        return sum(any(value is not None for row in result for value in row) for _, result in self._cases)

    @property
    def num_cases(self) -> int:
        """Databases that decide."""
        return len(self._cases)

    def accepts(self, predicted: str) -> bool:
        """Whether the prediction answers as the gold query does on every database."""
        return all(self._agrees(predicted, rows, result) for rows, result in self._cases)

    def _agrees(self, predicted: str, rows: list[list[Row]], result: Result) -> bool:
        with Database(self._layout, rows) as database:
            try:
                return same_result(result, database.run(predicted), ordered=self._ordered)
            except QueryFailed:
                return False

    def _run_gold(self, gold: str, rows: list[list[Row]], seed: int) -> tuple[Result, bool]:
        """What the gold query finds, and whether it finds the same whatever the order of rows and of ties."""
        rng = random.Random(seed)
        shuffled = [rng.sample(table, len(table)) for table in rows]
        try:
            with Database(self._layout, rows) as database, Database(self._layout, shuffled) as other:
                result = database.run(gold)
                is_stable = same_result(result, other.run(gold), ordered=self._ordered)
                return result, is_stable and not (result and self._has_tie(database, gold, len(result[0])))
        except QueryFailed as error:
            raise DataError(
                f"gold query on {self._layout.schema.db_id!r} does not run ({error}): {gold!r}; correct or remove it"
            ) from error

    def _has_tie(self, database: Database, gold: str, num_columns: int) -> bool:
        """Whether a tie decides what the gold query finds.

        SQLite sorts rows to group them, so that groups come in one order whatever the order of insertion.
        """
        try:
            up, down = (database.run(break_ties(gold, num_columns, descending=down)) for down in (False, True))
        except QueryFailed:  # an ORDER BY with something unusual behind its keys
            return False
        return not same_result(up, down, ordered=self._ordered)
