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
from msgspec import Meta
from rich.console import Console

from cllm_core.cli.command import INTERRUPTED_EXIT_CODE, exit_with
from cllm_core.config import EngineConfig
from cllm_core.errors import CllmError
from cllm_core.evaluation.tasks import TaskName

if TYPE_CHECKING:
    from cllm_core.evaluation.run import EvalConfig, Evaluation


class EvalOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `cllm eval` beside those of the model; what they mean for the library: EvalConfig."""

    task: Annotated[TaskName, Meta(description="What the data holds.")]
    data: Annotated[Path, Meta(description="Examples, as the data set publishes them: JSON, JSON lines, or .gz.")]
    tables: Annotated[Path | None, Meta(description="tables.json of Spider, for task spider.")] = None
    target: Annotated[
        str | None, Meta(description="Model that MODEL was trained from, to compare with. Left out: MODEL alone.")
    ] = None
    reference: Annotated[
        str | None,
        Meta(description="Model under which the perplexity of chat answers is measured. Left out: the target."),
    ] = None
    block_lengths: Annotated[
        str, Meta(description="Block lengths to compare beside AR, as in 16,32,64. Left out: the model's.")
    ] = ""
    limit: Annotated[int | None, Meta(description="Examples, drawn at random. Left out: all.")] = None
    seed: Annotated[int, Meta(description="Of that draw, and of the rows that SQL is run on.")] = 0
    max_tokens: Annotated[int | None, Meta(description="Limit of an answer. Left out: the task's.")] = None
    repeats: Annotated[
        int,
        Meta(
            description="Times each answer is decoded and timed, one request at a time. 0: no times, examples in "
            "batches."
        ),
    ] = 2
    cached_prefixes: Annotated[
        bool,
        Meta(
            description="Take times with the beginning of each prompt, as far as another example has it too, in the "
            "prefix cache, as a server has it. Left out: whole prompts are computed."
        ),
    ] = False
    each_drafter: Annotated[
        bool,
        Meta(
            description="Compare the sources of --drafters, each alone and all together, with AR: one table of "
            "quality, speed with one request and with 8 in flight, memory, lines."
        ),
    ] = False
    training_costs: Annotated[
        str, Meta(description="For that table: what training took, as in model=2 h on 2 cores,target=none.")
    ] = ""
    output: Annotated[
        Path | None,
        Meta(description="Folder of the results; an unfinished run in it goes on. Left out: runs/eval-TASK-TIME."),
    ] = None
    allow_code_execution: Annotated[
        bool, Meta(description="Run the code that the model writes, for task humaneval.")
    ] = False


def evaluate(model: EngineConfig, options: EvalOptions) -> None:
    """Measure the quality and speed of a model and, beside it, of the model it was trained from."""
    folder = options.output or Path("runs") / f"eval-{options.task}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    given = msgspec.structs.asdict(options) | {
        "data": str(options.data),
        "tables": None if options.tables is None else str(options.tables),
        "model": model,
        "target": _other_model(model, options.target),
        "reference": _other_model(model, options.reference),
        "block_lengths": _read_lengths(options.block_lengths),
        "output": str(folder),
        "command": shlex.join(["cllm", *sys.argv[1:]]),
    }
    if options.each_drafter:
        _compare_drafters(given, _read_costs(options.training_costs), folder)
    else:
        _show(_run(given, folder), folder)


def _compare_drafters(given: dict[str, object], costs: dict[str, str], folder: Path) -> None:
    from cllm_core.evaluation.drafter_table import (  # noqa: PLC0415
        TABLE_PNG,
        save_picture,
        table_for_terminal,
        verdicts,
    )
    from cllm_core.evaluation.each_drafter import compare_drafters  # noqa: PLC0415

    try:
        table = compare_drafters(_convert(given), costs, _report_stages(Console(stderr=True)))
        save_picture(table, folder / TABLE_PNG)
    except CllmError as error:
        exit_with(str(error))
    console = Console()
    console.print(table_for_terminal(table))
    console.print("\n".join(verdicts(table)), highlight=False)
    console.print(f"drafters.json, drafters.md and drafters.png are in {folder}", highlight=False)


def _read_costs(text: str) -> dict[str, str]:
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    if any(not equals for _, equals, _ in parts):
        exit_with(f"--training-costs {text}: give NAME=TEXT, separated by commas, as in model=2 h on 2 cores")
    return {name.strip(): cost.strip() for name, _, cost in parts}


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
