"""Laws of the generated rows."""

import sqlite3

import pytest

from cllm_core.errors import DataError
from cllm_core.evaluation.sql.database import Database
from cllm_core.evaluation.sql.layout import Layout, build_layout
from cllm_core.evaluation.sql.query_text import read_hints
from cllm_core.evaluation.sql.rows import Row, generate_rows
from cllm_core.tasks.spider import Column, ColumnRef, Schema, Table
from tests.evaluation.schemas import music_schema

SIZES = (4, 16, 60)


def make_rows(schema: Schema, gold: str, num_rows: int, seed: int) -> tuple[Layout, list[list[Row]]]:
    hints = read_hints(gold, schema)
    layout = build_layout(schema, hints)
    return layout, generate_rows(layout, hints.literals, num_rows=num_rows, seed=seed)


@pytest.mark.parametrize("num_rows", SIZES)
@pytest.mark.parametrize("seed", range(5))
def test_references_are_met_and_keys_unique(num_rows: int, seed: int) -> None:
    schema = music_schema()
    layout, tables = make_rows(schema, "SELECT * FROM song WHERE singer_id = 7 AND title = 'x'", num_rows, seed)
    for child, parent in layout.references():
        parents = {row[parent.column] for row in tables[parent.table]}
        assert {row[child.column] for row in tables[child.table]} <= parents
    for ref in layout.unique:
        values = [row[ref.column] for row in tables[ref.table]]
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("seed", range(5))
def test_circular_references_and_columns_with_two_parents_are_met(seed: int) -> None:
    one, two = ColumnRef(0, 0), ColumnRef(1, 0)
    third = ColumnRef(2, 0)
    tables = tuple(Table(name, (Column("key", "number"),)) for name in ("a", "b", "c"))
    schema = Schema("circle", tables, (one, two), ((one, two), (two, one), (third, one), (third, two)))
    _, rows = make_rows(schema, "SELECT * FROM a", 20, seed)
    assert set(rows[2]) <= set(rows[0]) == set(rows[1])


def test_a_primary_key_that_refers_to_another_table_may_repeat() -> None:
    layout, tables = make_rows(music_schema(), "SELECT * FROM plays", 60, 0)
    assert ColumnRef(3, 0) not in layout.unique
    assert len({row[0] for row in tables[3]}) < len(tables[3])


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    gold = "SELECT name FROM singer WHERE age > 30 OR name = 'Joe'"
    first, again, other = (make_rows(music_schema(), gold, 16, seed)[1] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_columns_hold_the_literals_and_their_neighbours() -> None:
    _, tables = make_rows(music_schema(), "SELECT name FROM singer WHERE age >= 33 AND name LIKE '%Jo_%'", 60, 0)
    assert {32, 33, 34} <= {row[2] for row in tables[0]}
    assert any("Jo" in str(row[1]) for row in tables[0])


def test_columns_that_only_the_query_joins_share_their_values() -> None:
    _, tables = make_rows(music_schema(), "SELECT * FROM song AS a JOIN concert AS b ON a.title = b.id", 16, 0)
    assert {str(row[1]) for row in tables[1]} <= {str(row[0]) for row in tables[2]}


def test_sqlite_agrees_that_no_foreign_key_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, tables = make_rows(music_schema(), "SELECT * FROM song", 30, 3)
    monkeypatch.setattr("cllm_core.evaluation.sql.database._authorise", lambda *words: sqlite3.SQLITE_OK)
    with Database(layout, tables) as database:
        assert database.run("PRAGMA foreign_key_check") == []


def test_a_schema_that_sqlite_refuses_is_an_error_that_names_it() -> None:
    schema = Schema("twice", (Table("t", (Column("a", "text"), Column("A", "text"))),))
    layout, rows = make_rows(schema, "SELECT 1", 4, 0)
    with pytest.raises(DataError, match="schema 'twice' cannot be built"):
        Database(layout, rows)


def test_tables_that_sqlite_keeps_for_itself_are_left_to_it() -> None:
    schema = Schema("own", (Table("sqlite_sequence", (Column("name", "text"),)), Table("t", (Column("a", "text"),))))
    layout, rows = make_rows(schema, "SELECT a FROM t", 4, 0)
    with Database(layout, rows) as database:
        assert sorted(database.run("SELECT a FROM t")) == sorted(rows[1])
