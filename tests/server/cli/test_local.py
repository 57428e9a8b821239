"""`cllm generate` and `cllm chat`: what they refuse, and that a conversation survives it."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from server.cli import app


def run(command: str, model: Path, *options: str, typed: str = "") -> Result:
    words = [command, str(model), "--device", "cpu", "--max-model-len", "64", *options]
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, words, input=typed)


def test_a_prompt_that_does_not_fit_ends_with_one_line(tiny_llama: Path) -> None:
    result = run("generate", tiny_llama, "--prompt", "Hello", "--max-tokens", "100")
    assert result.exit_code == 2
    assert "do not fit the context of 64 tokens" in result.stderr


def test_a_value_out_of_range_ends_before_the_model_is_read(tmp_path: Path) -> None:
    for command in ("generate", "chat"):
        options = ("--prompt", "Hello") if command == "generate" else ()
        result = run(command, tmp_path / "no-such-model", "--top-p", "2", *options)
        assert result.exit_code == 2
        assert "top_p=2.0" in result.stderr


def test_a_question_that_does_not_fit_is_forgotten_and_the_next_one_answered(tiny_llama: Path) -> None:
    result = run("chat", tiny_llama, "--max-tokens", "3", typed=f"{'long ' * 50}\nHi\n/exit\n")
    assert result.exit_code == 0
    assert "do not fit the context of 64 tokens" in result.stdout
    assert "3 tokens in" in result.stdout


def test_prompts_come_from_standard_input_and_a_broken_line_is_named(tiny_llama: Path) -> None:
    options = ("--file", "-", "--max-tokens", "1", "--json")
    result = run("generate", tiny_llama, *options, typed='{"prompt": "One"}\n\n{"prompt": "Two"}\n')
    assert [line["prompt"] for line in map(json.loads, result.stdout.splitlines())] == ["One", "Two"]
    for typed, message in (
        ('{"prompt": "One"}\n{"text": 2}\n', "--file standard input, line 2"),
        ("", "holds no prompt"),
    ):
        refused = run("generate", tiny_llama, *options, typed=typed)
        assert refused.exit_code == 2
        assert message in refused.stderr
