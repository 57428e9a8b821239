"""`cllm eval`: quality and speed of a CLLM, beside its target model, on a task.

torch is imported when the command runs, so that `cllm --help` stays quick.
"""

import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from cllm_core.config import EngineConfig
from cllm_core.errors import CllmError, ConfigError
from cllm_core.evaluation.tasks import TaskName
from server.options import exit_with
from server.settings import EngineSettings

if TYPE_CHECKING:
    from cllm_core.evaluation.run import EvalConfig, Evaluation

INTERRUPTED_EXIT_CODE = 130


def evaluate(
    settings: EngineSettings,
    *,
    task: Annotated[TaskName, typer.Option(help="What the data holds.")],
    data: Annotated[Path, typer.Option(help="Examples, as the data set publishes them: JSON, JSON lines, or .gz.")],
    tables: Annotated[Path | None, typer.Option(help="tables.json of Spider, for task spider.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Model that MODEL was trained from, to compare with. Left out: MODEL alone.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Model under which the perplexity of chat answers is measured. Left out: the target."),
    ] = None,
    block_lengths: Annotated[
        str, typer.Option(help="Block lengths to compare beside AR, as in 16,32,64. Left out: the model's.")
    ] = "",
    limit: Annotated[int | None, typer.Option(help="Examples, drawn at random. Left out: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of that draw, and of the rows that SQL is run on.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="Limit of an answer. Left out: the task's.")] = None,
    repeats: Annotated[
        int,
        typer.Option(
            help="Times each answer is decoded and timed, one request at a time. 0: no times, examples in batches."
        ),
    ] = 2,
    cached_prefixes: Annotated[
        bool,
        typer.Option(
            "--cached-prefixes",
            help="Take times with the beginning of each prompt, as far as another example has it too, in the prefix "
            "cache, as a server has it. Left out: whole prompts are computed.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; an unfinished run in it goes on. Left out: runs/eval-TASK-TIME."),
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that the model writes, for task humaneval.")
    ] = False,
) -> None:
    """Measure the quality and speed of a model and, beside it, of the model it was trained from."""
    folder = output or Path("runs") / f"eval-{task}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    model = _single_model(settings)
    given: dict[str, object] = {
        "task": task,
        "data": str(data),
        "tables": None if tables is None else str(tables),
        "model": model,
        "target": _other_model(model, target),
        "reference": _other_model(model, reference),
        "block_lengths": _read_lengths(block_lengths),
        "limit": limit,
        "seed": seed,
        "max_tokens": max_tokens,
        "repeats": repeats,
        "cached_prefixes": cached_prefixes,
        "output": str(folder),
        "allow_code_execution": allow_code_execution,
        "command": shlex.join(["cllm", *sys.argv[1:]]),
    }
    _show(_run(given, folder), folder)


def _single_model(settings: EngineSettings) -> EngineConfig:
    try:
        return settings.to_single_model_config()
    except ConfigError as error:
        exit_with(str(error))


def _run(given: dict[str, object], folder: Path) -> "Evaluation":
    from cllm_core.evaluation.run import evaluate as run_evaluation  # noqa: PLC0415

    try:
        return run_evaluation(_convert(given), _report_stages(Console(stderr=True)))
    except CllmError as error:
        exit_with(str(error))
    except KeyboardInterrupt:
        typer.secho(f"interrupted; the same command with --output {folder} goes on from here", err=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


def _convert(given: dict[str, object]) -> "EvalConfig":
    from cllm_core.evaluation.run import EvalConfig  # noqa: PLC0415

    try:
        return msgspec.convert(given, EvalConfig)
    except msgspec.ValidationError as error:
        exit_with(str(error))


def _other_model(model: EngineConfig, name: str | None) -> EngineConfig | None:
    """The settings of the evaluated model, for another one; None where none is named."""
    return None if name is None else msgspec.structs.replace(model, model=name, adapter=None, revision=None)


def _read_lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        exit_with(f"--block-lengths {text}: give whole numbers separated by commas, as in 16,32,64")


def _report_stages(console: Console) -> Callable[[str, float], None]:
    """A callback that prints each new stage of loading on a line of its own."""
    shown: list[str] = []

    def report(stage: str, fraction: float) -> None:
        del fraction
        if shown[-1:] != [stage]:
            shown.append(stage)
            console.print(stage, style="dim", highlight=False)

    return report


def _show(evaluation: "Evaluation", folder: Path) -> None:
    from cllm_core.evaluation.report import as_table, comparison_rows  # noqa: PLC0415

    console = Console()
    for picture in evaluation.pictures:
        console.print(picture.as_text(), highlight=False)
        console.print()
    console.print(as_table(evaluation.results))
    for name, value in comparison_rows(evaluation.results):
        console.print(f"  {name}: [bold]{value}[/]", highlight=False)
    console.print(f"results.json, results.md, answers.jsonl and pictures are in {folder}", highlight=False)
