"""Execution match: what counts as the same query and what does not, on a made-up schema."""

import pytest

from cllm_core.errors import DataError
from cllm_core.evaluation.sql.judge import DATABASE_SIZES, SqlJudge
from tests.evaluation.schemas import music_schema

SAME = [
    ("SELECT name FROM singer", "select  NAME from Singer;"),
    ("SELECT name FROM singer", "SELECT T1.name FROM singer AS T1"),
    ("SELECT name, age FROM singer", "SELECT age, name FROM singer"),
    ("SELECT name FROM singer WHERE age > 20", "SELECT name FROM singer WHERE NOT age <= 20"),
    ("SELECT max(age) FROM singer", "SELECT age FROM singer ORDER BY age DESC LIMIT 1"),
    ("SELECT max(age) FROM singer WHERE name = 'Joe'", "SELECT age FROM singer WHERE name = 'Joe' "
     "ORDER BY 1 DESC LIMIT 1"),
    ("SELECT name FROM singer WHERE id IN (SELECT singer_id FROM song)", "SELECT T1.name FROM singer AS T1 "
     "JOIN song AS T2 ON T1.id = T2.singer_id GROUP BY T1.id, T1.name"),
    ('SELECT age FROM singer WHERE name = "Joe"', "SELECT age FROM singer WHERE name = 'Joe'"),
    ("SELECT name FROM singer ORDER BY age", "SELECT name FROM singer ORDER BY age ASC"),
    ("SELECT count(*) FROM song WHERE title LIKE '%love%'", "SELECT sum(title LIKE '%love%') FROM song"),
    ("SELECT avg(age) FROM singer", "SELECT sum(age) * 1.0 / count(age) FROM singer"),
]  # fmt: skip
DIFFERENT = [
    ("SELECT name FROM singer ORDER BY age", "SELECT name FROM singer ORDER BY age DESC"),
    ("SELECT name FROM singer ORDER BY age", "SELECT name FROM singer"),
    ("SELECT DISTINCT name FROM singer", "SELECT name FROM singer"),
    ("SELECT name FROM singer WHERE age > 20", "SELECT name FROM singer WHERE age >= 20"),
    ("SELECT name FROM singer WHERE name = 'Joe'", "SELECT name FROM singer WHERE name = 'Jo'"),
    ("SELECT name FROM singer ORDER BY id LIMIT 1", "SELECT name FROM singer ORDER BY id LIMIT 2"),
    ("SELECT name, age FROM singer", "SELECT name FROM singer"),
    ("SELECT count(*) FROM song", "SELECT count(DISTINCT singer_id) FROM song"),
    ("SELECT singer_id FROM song GROUP BY singer_id HAVING count(*) >= 2", "SELECT DISTINCT singer_id FROM song"),
    ("SELECT name FROM singer WHERE age > 20 AND name = 'Joe'", "SELECT name FROM singer WHERE age > 20 "
     "OR name = 'Joe'"),
    ("SELECT name FROM singer WHERE id NOT IN (SELECT singer_id FROM song)", "SELECT name FROM singer"),
    ("SELECT count(*) FROM singer WHERE age > 999999", "SELECT count(*) FROM singer WHERE age < 999999"),
]  # fmt: skip
HOSTILE = [
    "SELEC name FROM singer",
    "SELECT height FROM singer",
    "",
    "DROP TABLE singer",
    "DELETE FROM singer; SELECT name FROM singer",
    "SELECT name FROM singer; SELECT name FROM singer",
    "PRAGMA database_list",
    "ATTACH 'other.db' AS other",
    "SELECT name FROM singer\0",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT n FROM t",
    "SELECT zeroblob(900000000) FROM singer",
    "SELECT random() FROM singer",
    "SELECT CAST(x'ff' AS TEXT) FROM singer",
    "(" * 5000,
]


@pytest.mark.parametrize(("gold", "predicted"), SAME)
def test_queries_of_one_meaning_match(gold: str, predicted: str) -> None:
    assert SqlJudge(music_schema(), gold).accepts(predicted)


@pytest.mark.parametrize(("gold", "predicted"), DIFFERENT)
def test_queries_of_two_meanings_do_not_match(gold: str, predicted: str) -> None:
    assert not SqlJudge(music_schema(), gold).accepts(predicted)


@pytest.mark.parametrize("predicted", HOSTILE, ids=range(len(HOSTILE)))
def test_wrong_and_hostile_predictions_do_not_match_and_end(predicted: str) -> None:
    assert not SqlJudge(music_schema(), "SELECT name FROM singer").accepts(predicted)


def test_a_gold_query_that_does_not_run_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match=r"'music' does not run \(no such column: height\).*SELECT height"):
        SqlJudge(music_schema(), "SELECT height FROM singer")


@pytest.mark.parametrize("predicted", ["", "-- nothing"])
def test_what_is_no_query_does_not_match_one_that_finds_nothing(predicted: str) -> None:
    judge = SqlJudge(music_schema(), "SELECT name FROM singer WHERE age IS NULL")
    assert judge.num_found == 0
    assert judge.accepts("SELECT title FROM song WHERE title IS NULL")
    assert not judge.accepts(predicted)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT singer_id FROM song GROUP BY singer_id ORDER BY count(*) DESC{} LIMIT 1",
        "SELECT singer_id FROM song GROUP BY singer_id ORDER BY count(*){} LIMIT 3",
        "SELECT DISTINCT age FROM singer ORDER BY age % 3{} LIMIT 2;",
        "SELECT open_air, count(*) FROM concert GROUP BY open_air ORDER BY count(*) DESC{}",
        "SELECT name FROM singer WHERE id IN (SELECT singer_id FROM song GROUP BY singer_id "
        "ORDER BY count(*) DESC{} LIMIT 1)",
        "SELECT name, age % 2 AS odd FROM singer UNION SELECT title, 1 FROM song ORDER BY odd{} LIMIT 1",
    ],
)
def test_whatever_breaks_the_ties_of_groups_is_right(query: str) -> None:
    """SQLite groups by sorting, so that the order of insertion does not show that a tie was broken at will."""
    judge = SqlJudge(music_schema(), query.format(""))
    assert judge.accepts(query.format(", 1"))
    assert judge.accepts(query.format(", 1 DESC"))


def test_ties_that_change_nothing_pass_no_database_over() -> None:
    query = "SELECT max(age) FROM singer GROUP BY 1 = 1 ORDER BY count(*) LIMIT 1"
    assert SqlJudge(music_schema(), query).num_cases == len(DATABASE_SIZES)


def test_databases_on_which_ties_leave_the_gold_result_open_are_passed_over() -> None:
    judge = SqlJudge(music_schema(), "SELECT name FROM singer ORDER BY age LIMIT 1")
    assert 0 < judge.num_cases < 10
    assert judge.accepts("SELECT name FROM singer WHERE age = (SELECT min(age) FROM singer) LIMIT 1")


def test_literals_of_the_gold_query_make_it_find_rows() -> None:
    joined = "SELECT T1.title FROM song AS T1 JOIN singer AS T2 ON T1.singer_id = T2.id"
    assert SqlJudge(music_schema(), f"{joined} WHERE T2.name = 'Zoe' AND T2.age > 70").num_found >= 3
