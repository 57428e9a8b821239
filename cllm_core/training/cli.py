"""`cllm sft`, `cllm trajectories` and `cllm train`: making a Consistency LLM.

torch is imported when a command runs, so that `cllm --help` stays quick.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cllm_core.cli.command import INTERRUPTED_EXIT_CODE, exit_with
from cllm_core.errors import CllmError
from cllm_core.training.config import SftConfig, TrainConfig, TrajectoryConfig


def sft(config: SftConfig) -> None:
    """Fine-tune a model on prompts with answers: the teacher of a Consistency LLM, where the model cannot do the task.

    A run that was interrupted goes on from its last checkpoint when the same command is given again.
    """
    from cllm_core.training.run import run_sft  # noqa: PLC0415

    _report(lambda progress: run_sft(config, progress))


def train(config: TrainConfig) -> None:
    """Train a Consistency LLM on recorded trajectories, or on answers with made-up noise.

    A run that was interrupted goes on from its last checkpoint when the same command is given again.
    """
    from cllm_core.training.run import run_train  # noqa: PLC0415

    _report(lambda progress: run_train(config, progress))


def trajectories(config: TrajectoryConfig) -> None:
    """Record the Jacobi trajectories of a teacher: its answers, and every state on the way to them.

    A run that was interrupted goes on where it stopped when the same command is given again.
    """
    from cllm_core.training.trajectories import record_trajectories  # noqa: PLC0415

    _report(lambda progress: record_trajectories(config, progress))


def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    results: Annotated[list[Path] | None, typer.Argument(help="results.md files of `cllm eval`.")] = None,
) -> None:
    """Write the model card of a trained model anew, with the results of evaluations."""
    from cllm_core.training.card import rewrite_card  # noqa: PLC0415

    _report(lambda progress: rewrite_card(folder, results or []))


def _report(run: Callable[[Callable[[str, float], None]], Path]) -> None:
    """Run, show what is loaded, and say where the result is; errors end the program with one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "httpx2"):  # the Hub's client reports every request
        logging.getLogger(name).setLevel(logging.WARNING)
    console = Console(stderr=True)
    try:
        folder = run(lambda stage, fraction: console.log(f"{stage} ({fraction:.0%})"))
    except CllmError as error:
        exit_with(str(error))
    except KeyboardInterrupt:
        console.print("interrupted; give the same command again to go on")
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    console.print(f"[bold]{folder}[/]")
