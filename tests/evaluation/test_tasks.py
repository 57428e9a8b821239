"""Reading tasks and scoring answers; wrong data and settings."""

import json
from pathlib import Path

import pytest

from cllm_core.errors import ConfigError, DataError
from cllm_core.evaluation.tasks import Example, choose_examples, load_task, read_sql

TABLES = [
    {
        "db_id": "zoo",
        "table_names_original": ["animal"],
        "column_names_original": [[-1, "*"], [0, "id"], [0, "name"]],
        "column_types": ["text", "number", "text"],
        "primary_keys": [1],
        "foreign_keys": [],
    }
]


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def write_spider(folder: Path, db_id: str = "zoo") -> tuple[Path, Path]:
    example = {"db_id": db_id, "question": "Names?", "query": "SELECT name FROM animal"}
    return (
        write(folder / "dev.json", json.dumps([example])),
        write(folder / "tables.json", json.dumps(TABLES)),
    )


def test_spider_answers_are_scored_by_execution_and_by_text(tmp_path: Path) -> None:
    data, tables = write_spider(tmp_path)
    task = load_task("spider", data, tables=tables)
    assert task.examples == [Example("0", "animal(id, name)\n\nNames?")]
    assert task.score("0", "```sql\nselect NAME from animal;\n```") == {"execution": 1.0, "exact": 1.0}
    assert task.score("0", "SELECT T.name FROM animal AS T") == {"execution": 1.0, "exact": 0.0}
    assert task.score("0", "SELECT id FROM animal") == {"execution": 0.0, "exact": 0.0}


def test_gsm8k_answers_are_scored_by_their_number(tmp_path: Path) -> None:
    data = write(tmp_path / "test.jsonl", '{"question": "1+1?", "answer": "#### 2"}\n')
    task = load_task("gsm8k", data)
    assert (task.score("0", "It is 2."), task.score("0", "It is 3.")) == ({"accuracy": 1.0}, {"accuracy": 0.0})


def test_chat_takes_the_first_turn_and_plain_prompts(tmp_path: Path) -> None:
    lines = '{"question_id": 81, "turns": ["Hi", "Again"]}\n\n{"question_id": 82, "prompt": "Hello"}\n'
    task = load_task("chat", write(tmp_path / "q.jsonl", lines))
    assert task.examples == [Example("81", "Hi"), Example("82", "Hello")]


def test_humaneval_needs_consent_and_spider_its_schemas(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        load_task("humaneval", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"--tables tables\.json"):
        load_task("spider", tmp_path / "x")


def test_an_unknown_database_is_named(tmp_path: Path) -> None:
    data, tables = write_spider(tmp_path, db_id="farm")
    with pytest.raises(DataError, match=r"dev\.json, record 0: db_id 'farm'"):
        load_task("spider", data, tables=tables)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "holds no record"),
        ('{"turns": ["a"]}\n{"turns": ["b"\n', "line 2"),
        ('{"turns": ["a"]}\n{"turns": []}\n', "line 2.*holds text"),
    ],
)
def test_missing_empty_and_broken_files_are_errors_that_say_where(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"q\.jsonl.*{message}"):
        load_task("chat", path)


def test_a_higher_limit_adds_to_the_examples_of_a_lower_one() -> None:
    examples = [Example(str(index), "") for index in range(20)]
    few, more = choose_examples(examples, 5, seed=3), choose_examples(examples, 9, seed=3)
    assert set(few) < set(more)
    assert more == sorted(more, key=examples.index)
    assert choose_examples(examples, 5, seed=4) != few
    assert choose_examples(examples, 99, seed=3) == choose_examples(examples, None, seed=3) == examples


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT 1",
        " SELECT 1\n",
        "Sure:\n```sql\nSELECT 1\n```\nDone.",
        "```SELECT 1",
        "```sql SELECT 1```",
        "```\nSELECT 1",
    ],
)
def test_the_query_is_found_in_an_answer(answer: str) -> None:
    assert read_sql(answer) == "SELECT 1"
