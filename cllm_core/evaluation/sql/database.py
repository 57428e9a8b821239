"""An in-memory SQLite database with the rows it is given, on which strangers' queries can do no harm.

A query may only read. It is stopped after a number of virtual-machine instructions, not of seconds, so that the
verdict is the same on every machine; its values and its result have limits too.
"""

import sqlite3
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from cllm_core.errors import CllmError, DataError
from cllm_core.evaluation.sql.layout import Layout
from cllm_core.evaluation.sql.rows import Row
from cllm_core.tasks.spider import ColumnRef

SqlValue = int | float | str | bytes | None
Result = list[tuple[SqlValue, ...]]

_RESERVED_PREFIX = "sqlite_"  # tables that SQLite keeps for itself; some schemas of Spider list them
_MAX_INSTRUCTIONS = 10_000_000  # about half a second; Spider's own queries need a few thousand
_CHECK_INTERVAL = 10_000  # instructions between two looks at the budget
_MAX_RESULT_ROWS = 10_000
_MAX_VALUE_BYTES = 1_000_000
_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
# an answer that depends on chance cannot be judged, and extensions are code
_FORBIDDEN_FUNCTIONS = ("random", "randomblob", "load_extension")


class QueryFailed(CllmError):
    """A query is wrong, not allowed, or takes too long."""


class Database:
    """A filled database; close it, or use it as a context manager.

    Args:
        layout: tables, keys and types.
        rows: of every table, in the order of the schema.

    Raises:
        DataError: SQLite refuses the schema.
    """

    def __init__(self, layout: Layout, rows: Sequence[Sequence[Row]]) -> None:
        self._connection = sqlite3.connect(":memory:")
        self._instructions_left = 0
        try:
            self._build(layout, rows)
        except sqlite3.Error as error:
            self.close()
            raise DataError(
                f"schema {layout.schema.db_id!r} cannot be built in SQLite ({error}); correct it"
            ) from error
        self._connection.text_factory = lambda data: data.decode("utf-8", "replace")
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        self._connection.set_authorizer(_authorise)
        self._connection.set_progress_handler(self._spend_instructions, _CHECK_INTERVAL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        self._connection.close()

    def run(self, sql: str) -> Result:
        """The rows that a query yields.

        Raises:
            QueryFailed: it is no single valid query, does more than read, or goes beyond a limit.
        """
        self._instructions_left = _MAX_INSTRUCTIONS
        try:
            cursor = self._connection.execute(sql)
            rows: Result = cursor.fetchmany(_MAX_RESULT_ROWS + 1)
        # ValueError: text that is no UTF-8, or a null character in the query
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
            raise QueryFailed(str(error) or type(error).__name__) from error
        if cursor.description is None:
            raise QueryFailed("no statement")
        if len(rows) > _MAX_RESULT_ROWS:
            raise QueryFailed(f"more than {_MAX_RESULT_ROWS} rows")
        return rows

    def _build(self, layout: Layout, rows: Sequence[Sequence[Row]]) -> None:
        for index, table in enumerate(layout.schema.tables):
            if table.name.lower().startswith(_RESERVED_PREFIX):
                continue
            self._connection.execute(_create_table(layout, index))
            places = ", ".join("?" * len(table.columns))
            self._connection.executemany(f"INSERT INTO {_quote(table.name)} VALUES ({places})", rows[index])
        self._connection.commit()

    def _spend_instructions(self) -> bool:
        """Called by SQLite between instructions; True stops the query."""
        self._instructions_left -= _CHECK_INTERVAL
        return self._instructions_left < 0


def _create_table(layout: Layout, index: int) -> str:
    table = layout.schema.tables[index]
    refs = [ColumnRef(index, position) for position in range(len(table.columns))]
    parts = [_define_column(layout, ref) for ref in refs]
    parts += [
        f"FOREIGN KEY ({_quote(layout.schema.column(child).name)}) "
        f"REFERENCES {_quote(layout.schema.tables[parent.table].name)} ({_quote(layout.schema.column(parent).name)})"
        for child, parent in layout.references()
        if child.table == index
    ]
    return f"CREATE TABLE {_quote(table.name)} ({', '.join(parts)})"


def _define_column(layout: Layout, ref: ColumnRef) -> str:
    # NUMERIC, since INTEGER PRIMARY KEY would name SQLite's row id and fix the order of the rows
    affinity = "NUMERIC" if layout.is_numeric(ref) else "TEXT"
    return f"{_quote(layout.schema.column(ref).name)} {affinity}{' UNIQUE' if ref in layout.unique else ''}"


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _authorise(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    del first, database, source
    if action == sqlite3.SQLITE_FUNCTION:
        return sqlite3.SQLITE_DENY if (second or "").lower() in _FORBIDDEN_FUNCTIONS else sqlite3.SQLITE_OK
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY
