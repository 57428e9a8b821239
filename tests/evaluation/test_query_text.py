"""What is read from the text of a query."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_core.evaluation.sql.query_text import break_ties, is_ordered, normalise, read_hints
from cllm_core.tasks.spider import ColumnRef
from tests.evaluation.schemas import music_schema


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("SELECT  Name FROM singer ;", "select name from singer", True),
        ('SELECT a WHERE b = "X"', "select A where B == 'X'", True),
        ("SELECT a WHERE b <> 1", "SELECT a WHERE b != 1", True),
        ("SELECT a WHERE b = 'x'", "SELECT a WHERE b = 'X'", False),
        ("SELECT a , b", "SELECT a,b", True),
        ("SELECT a", "SELECT b", False),
    ],
)
def test_normal_form_forgets_spelling_but_not_meaning(left: str, right: str, same: bool) -> None:
    assert (normalise(left) == normalise(right)) is same


def test_only_an_outer_order_by_orders() -> None:
    assert is_ordered("SELECT a FROM t ORDER BY a")
    assert not is_ordered("SELECT a FROM t WHERE a = (SELECT a FROM t ORDER BY a LIMIT 1)")


def test_literals_go_to_the_column_they_are_compared_with() -> None:
    gold = 'SELECT name FROM singer WHERE age > 30 AND T1.name = "Joe\'s" OR id IN (1, -2.5) ORDER BY age LIMIT 3'
    assert read_hints(gold, music_schema()).literals == {"age": (31,), "name": ("Joe's",), "id": (1, -2.5)}


def test_joins_are_read_through_aliases_and_subqueries() -> None:
    joined = "SELECT * FROM singer AS x JOIN song AS y ON x.id = y.singer_id"
    gold = f"{joined} WHERE y.id NOT IN (SELECT concert_id FROM plays)"
    singer_id, song_singer, song_id, concert_id = ColumnRef(0, 0), ColumnRef(1, 2), ColumnRef(1, 0), ColumnRef(3, 1)
    assert read_hints(gold, music_schema()).joins == ((singer_id, song_singer), (song_id, concert_id))


@given(st.text(max_size=60))
def test_any_text_can_be_read(text: str) -> None:
    read_hints(text, music_schema())
    assert normalise(normalise(text)) == normalise(text) or '"' in text or "'" in text or "`" in text


def test_ties_are_broken_behind_the_keys_of_each_order_by() -> None:
    inner = "(SELECT a FROM t GROUP BY a ORDER BY count(*){} LIMIT 1)"
    query = f"SELECT b, ';' FROM u WHERE b = {inner} ORDER BY max(b, 1) DESC{{}} LIMIT 2;"
    spaceless = break_ties(query.format("", ""), 2, descending=True).replace(" ", "")
    assert spaceless == query.format(", 1 DESC", ", 1 DESC, 2 DESC").replace(" ", "")
    assert break_ties("SELECT b FROM u ORDER BY b", 1, descending=False).strip() == "SELECT b FROM u ORDER BY b, 1"
    assert break_ties("SELECT b FROM u", 1, descending=False) == "SELECT b FROM u"
