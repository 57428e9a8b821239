"""`cllm check`: whether a model is served right on this machine.

torch is imported when the command runs, so that `cllm --help` stays quick.
"""

import sys
from typing import Annotated

import typer
from rich.console import Console

from cllm_core.cli.command import exit_with
from cllm_core.config import EngineConfig
from cllm_core.errors import CllmError

DIFFERS_EXIT_CODE = 1


def check(
    model: EngineConfig,
    *,
    tokens: Annotated[int, typer.Option(min=2, help="Length of each of the two random texts that are compared.")] = 512,
) -> None:
    """Compare a model with transformers, and show which path each of its parts takes; exit code 1 where it differs."""
    from cllm_core.check.report import check_model, render  # noqa: PLC0415

    console = Console(stderr=True)
    try:
        with console.status("loading") as status:
            report = check_model(
                model, num_tokens=tokens, on_progress=lambda stage, fraction: status.update(f"{stage} ({fraction:.0%})")
            )
    except CllmError as error:
        exit_with(str(error))
    sys.stdout.write(render(report))
    if not report.is_right:
        raise typer.Exit(DIFFERS_EXIT_CODE)
