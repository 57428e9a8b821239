"""The commands sft, trajectories and train."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cllm_core.training.run import run_sft
from server.cli import app
from tests.training.factories import make_sft, no_progress, write_lines, write_questions


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("command", ["sft", "trajectories", "train"])
def test_help_names_every_option_with_its_meaning(command: str) -> None:
    code, text = invoke(command, "--help")
    assert code == 0
    assert "--output" in text
    assert "--data" in text


def test_sft_writes_an_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    code, text = invoke(
        "sft", tiny_llama, "--data", write_questions(tmp_path), "--output", tmp_path / "out", "--max-steps", 1,
        "--device", "cpu", "--precision", "float32", "--pack-length", 64, "--packs-per-step", 1,
    )  # fmt: skip
    assert code == 0, text
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_switches_are_given_without_a_value(tiny_llama: Path, tmp_path: Path) -> None:
    code, text = invoke(
        "sft", tiny_llama, "--data", write_questions(tmp_path), "--output", tmp_path / "out", "--max-steps", 1,
        "--device", "cpu", "--precision", "float32", "--pack-length", 64, "--packs-per-step", 1,
        "--full", "--no-resume",
    )  # fmt: skip
    assert code == 0, text
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft"], "give --data"),
        (["train"], "trajectories, data: give one of them"),
        (["train", "--data", "x.jsonl", "--block-length", "999"], "block_length=999"),
        (["trajectories"], "data, self_written"),
    ],
)
def test_wrong_options_end_with_one_line_and_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, text = invoke(*arguments, "--output", tmp_path / "out")
    assert code == 2
    assert message in text


def test_broken_line_ends_with_its_number(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", [{"prompt": "Hi", "answer": "x"}])
    data.write_text(data.read_text() + "{broken\n")
    code, text = invoke("sft", tiny_llama, "--data", data, "--output", tmp_path / "out", "--device", "cpu")
    assert code == 2
    assert "a.jsonl, line 2" in text.replace("\n", "")


def test_card_takes_results_under_its_own_heading(tiny_llama: Path, tmp_path: Path) -> None:
    folder = run_sft(make_sft(tiny_llama, write_questions(tmp_path), tmp_path / "out", max_steps=1), no_progress)
    assert "None yet" in (folder / "README.md").read_text()
    (tmp_path / "results.md").write_text("# Spider\n\n| TPF | 3.5 |\n")
    code, text = invoke("card", folder, tmp_path / "results.md")
    assert code == 0, text
    assert "## Results\n\n### Spider\n\n| TPF | 3.5 |" in (folder / "README.md").read_text()
    code, text = invoke("card", tmp_path)
    assert code == 2
    assert "training.json" in text.replace("\n", "")
