"""Help reads well at 80 columns: no name is cut, no line is longer, and every command stands under a heading."""

import re

import pytest
import typer
from typer.testing import CliRunner

from cllm_core import __version__
from server.cli import app
from server.cli.names import flag_of
from server.settings import ServerSettings

COMMANDS = [
    *(["serve"], ["deploy"], ["worker"], ["generate"], ["chat"], ["models"], ["pull"], ["info"], ["check"], ["export"]),
    *(["sft"], ["trajectories"], ["train"], ["card"], ["eval"], ["bench"], ["bench", "engine"]),
]


def help_of(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=lambda command: "-".join(command) or "cllm")
def test_no_line_is_wider_than_80_columns(command: list[str]) -> None:
    assert max(map(len, help_of(*command).splitlines())) <= 80


def test_the_help_of_serve_names_every_flag_in_full() -> None:
    shown = set(re.findall(r"--[a-z0-9-]+", help_of("serve")))
    assert {flag_of(name, info) for name, info in ServerSettings.model_fields.items() if name != "model"} <= shown


def test_the_help_of_serve_names_choices_defaults_and_variables() -> None:
    text = " ".join(help_of("serve").split())
    assert "--dtype auto|float32|bfloat16|float16" in text
    assert "[default: auto, CLLM_DTYPE]" in text
    assert "One of auto, hermes, llama3" in text


def test_all_commands_stand_under_headings() -> None:
    group = typer.main.get_command(app)
    assert {command[0] for command in COMMANDS} == set(group.commands)  # type: ignore[attr-defined]
    headings = re.findall(r"^(\w.*):$", help_of(), flags=re.MULTILINE)
    assert headings == [
        "Options",
        "Serve",
        "Use a model in the terminal",
        "Models",
        "Train a Consistency LLM",
        "Measure",
    ]


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"cllm-server {__version__}\n"
