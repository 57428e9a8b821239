"""Sources of drafts in one table."""

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from cllm_core.config import EngineConfig
from cllm_core.engine.drafters.copies import KnownText
from cllm_core.errors import ConfigError
from cllm_core.evaluation.drafter_table import DrafterTable, save_picture, verdicts
from cllm_core.evaluation.each_drafter import compare_drafters, num_lines
from cllm_core.evaluation.run import EvalConfig
from server.cli import app
from tests.engine.factories import text_drafters

ENGINE: dict[str, object] = {
    "device": "cpu",
    "dtype": "float32",
    "num_cache_blocks": 64,
    "num_threads": 1,
    "block_length": 8,
    "suffix_memory_mib": 1,
    "adaptive_block_length": False,
}
QUESTIONS = ["Why?", "What does the server read?", "Why?"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps({"turns": [question]}) + "\n" for question in QUESTIONS))
    return path


def compare(model: Path, data: Path, output: Path, **settings: object) -> DrafterTable:
    engine = msgspec.convert({"model": str(model), "drafters": ("own", "suffix"), **ENGINE}, EngineConfig)
    given = {"task": "chat", "data": str(data), "model": engine, "max_tokens": 12, "repeats": 1, **settings}
    config = EvalConfig(output=str(output), **given)  # type: ignore[arg-type]
    return compare_drafters(config, {"model": "one night"}, lambda stage, fraction: None)


def test_every_source_is_measured_alone_and_all_together(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    table = compare(tiny_llama, questions, tmp_path / "out")
    assert [row.name for row in table.rows] == ["AR", "own", "suffix", "own + suffix"]
    assert all(row.same_as_ar == 1.0 and row.training == "one night" for row in table.rows)
    plain, own, suffix, both = table.rows
    assert plain.tokens_per_forward == plain.speedup == plain.speedup_together == 1.0
    # The third question is the first one again; nothing that another way was answered is known.
    assert suffix.tokens_per_forward == pytest.approx(3 * 11 / (11 + 11 + 2), rel=0.1)
    assert [row.num_bytes for row in (plain, own)] == [0, 0]
    assert suffix.num_bytes == both.num_bytes == pytest.approx(2**20, rel=0.01)
    assert own.num_lines + suffix.num_lines == both.num_lines
    page = (tmp_path / "out" / "drafters.md").read_text()
    assert "| model | own + suffix |" in page
    assert "- Fastest with one request at a time: model with " in page
    save_picture(table, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_lines_of_a_source_are_those_of_its_own_modules() -> None:
    own, copy, suffix = (
        num_lines(source) for source in text_drafters(EngineConfig(drafters=("own", "copy", "suffix")))
    )
    assert 15 < own < 40
    assert 15 < copy < 40
    assert suffix > 150  # with its index
    assert num_lines(KnownText()) == copy


def test_the_page_says_where_a_model_loses(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    target = msgspec.convert({"model": str(tiny_llama), "drafters": ("suffix",), **ENGINE}, EngineConfig)
    table = compare(tiny_llama, questions, tmp_path / "out", target=target)
    assert {row.model for row in table.rows} == {"model", "target"}
    lines = verdicts(table)
    assert "model with" in lines[0]
    assert "target with" in lines[0]
    slow = [row for row in table.rows if min(row.speedup, row.speedup_together) < 1]
    assert ("Slower than AR" in lines[-1]) == bool(slow)


@pytest.mark.parametrize(("settings", "message"), [({"repeats": 0}, "repeats=0"), ({"block_lengths": (4,)}, "block_l")])
def test_what_makes_no_table_is_refused(
    tiny_llama: Path, questions: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(tiny_llama, questions, tmp_path / "out", **settings)


def test_the_command_prints_the_table(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    words = ["eval", str(tiny_llama), "--task", "chat", "--data", str(questions), "--drafters", "own,copy"]
    words += ["--each-drafter", "--max-tokens", "6", "--repeats", "1", "--num-cache-blocks", "64", "--device", "cpu"]
    words += ["--training-costs", "own=none, copy=none", "--output", str(tmp_path / "out")]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert "own + copy" in result.stdout
    assert (tmp_path / "out" / "drafters.png").exists()
    assert json.loads((tmp_path / "out" / "drafters.json").read_text())["rows"][1]["training"] == "none"
