"""Reading Spider and formatting its prompt."""

from pathlib import Path

import pytest

from cllm_core.errors import DataError
from cllm_core.tasks.spider import ColumnRef, format_answer, format_prompt, load_examples, load_schemas
from tests.tasks.factories import QUESTION, SCHOOL, write_json, write_spider


def test_prompt_is_a_line_per_table_an_empty_line_and_the_question(tmp_path: Path) -> None:
    _, tables = write_spider(tmp_path)
    schema = load_schemas(tables)["school"]
    assert format_prompt(schema, "How many?") == "Student(StuID, Last Name)\nHas_Pet(StuID, pet_name)\n\nHow many?"


def test_keys_refer_to_columns_within_their_tables(tmp_path: Path) -> None:
    schema = load_schemas(write_spider(tmp_path)[1])["school"]
    assert schema.primary_keys == (ColumnRef(0, 0),)
    assert schema.foreign_keys == ((ColumnRef(1, 0), ColumnRef(0, 0)),)
    assert schema.column(ColumnRef(1, 1)).name == "pet_name"


def test_composite_primary_keys_are_read(tmp_path: Path) -> None:
    """Later editions of Spider write them as lists."""
    tables = write_json(tmp_path / "tables.json", [SCHOOL | {"primary_keys": [[3, 4], 1]}])
    assert load_schemas(tables)["school"].primary_keys == (ColumnRef(1, 0), ColumnRef(1, 1), ColumnRef(0, 0))


def test_answer_is_the_query_on_one_line_without_its_semicolon() -> None:
    assert format_answer("SELECT count(*)  FROM\n Student ;") == "SELECT count(*) FROM Student"


def test_question_on_an_unknown_database_is_named(tmp_path: Path) -> None:
    data, tables = write_spider(tmp_path, db_id="zoo")
    with pytest.raises(DataError, match=r"train\.json, record 0: db_id 'zoo' is not among the 1 schemas"):
        load_examples(data, load_schemas(tables))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "malformed"),
        ("[]", "holds no record"),
        ('{"a": 1}', "Expected `array`"),
        ('[{"db_id": "school", "question": "?"}]', "missing required field `query`"),
    ],
)
def test_broken_questions_are_refused_with_file_and_reason(tmp_path: Path, content: str, message: str) -> None:
    data, tables = write_spider(tmp_path)
    data.write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        load_examples(data, load_schemas(tables))
    assert str(data) in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [{"column_names_original": [[7, "x"]], "column_types": ["text"]}, {"primary_keys": [99]}, {"column_types": []}],
)
def test_schema_that_contradicts_itself_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    tables = write_json(tmp_path / "tables.json", [SCHOOL | change])
    with pytest.raises(DataError, match="schema 'school'"):
        load_schemas(tables)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json: cannot be read"):
        load_examples(tmp_path / "absent.json", {})


def test_fields_beyond_those_used_are_passed_over(tmp_path: Path) -> None:
    data, tables = write_spider(tmp_path)
    write_json(data, [QUESTION | {"sql": {"from": []}}])
    assert load_examples(data, load_schemas(tables))[0].question == "How many students?"
