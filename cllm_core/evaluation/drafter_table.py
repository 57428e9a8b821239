"""The table of sources of drafts: as JSON, Markdown, for the terminal and as a picture. No torch in here."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cllm_core.errors import ConfigError
from cllm_core.evaluation.machine import Machine
from cllm_core.evaluation.report import ModelDescription, describe_hardware, describe_model, markdown_table

TABLE_JSON, TABLE_MARKDOWN, TABLE_PNG = "drafters.json", "drafters.md", "drafters.png"
_MIB = 2**20


class DrafterRow(msgspec.Struct, frozen=True, kw_only=True):
    """One way to draft for one model.

    Attributes:
        model: role of the model.
        name: sources, "AR" for none.
        scores: mean of each measure of the task, 0..1; empty where the task has none.
        same_as_ar: share of answers equal, token for token, to those of AR with the same model.
        tokens_per_forward: one request at a time, prefill not counted.
        tokens_per_second, tokens_per_second_together: one request at a time, and several in flight, prefill included.
        speedup, speedup_together: the same over AR with the same model, measured in turns.
        num_bytes: of weights and cache beyond the model's, counted.
        resident_bytes: by which memory grew for them; a gated adapter's are the counted ones.
        training: what it took, as given; "" where nothing is known.
        num_lines: of code.
    """

    model: str
    name: str
    scores: dict[str, float]
    same_as_ar: float
    tokens_per_forward: float
    tokens_per_second: float
    tokens_per_second_together: float
    speedup: float
    speedup_together: float
    num_bytes: int
    resident_bytes: int
    training: str
    num_lines: int


class DrafterTable(msgspec.Struct, frozen=True, kw_only=True):
    """All that a comparison found; fields as in Results, and in_flight: requests at a time where several were."""

    task: str
    data: str
    command: str
    num_examples: int
    seed: int
    repeats: int
    max_tokens: int
    in_flight: int
    machine: Machine
    models: tuple[ModelDescription, ...]
    rows: tuple[DrafterRow, ...]


def save_table(table: DrafterTable, folder: Path) -> None:
    """Write drafters.json and drafters.md."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TABLE_JSON).write_bytes(msgspec.json.format(msgspec.json.encode(table)) + b"\n")
        (folder / TABLE_MARKDOWN).write_text(table_as_markdown(table), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written ({error}); name another folder") from error


def table_for_terminal(table: DrafterTable) -> Table:
    """A row for each way to draft."""
    shown = Table(title=f"{table.task}, {table.num_examples} examples", box=SIMPLE_HEAD, pad_edge=False)
    header, rows = _cells(table)
    for index, name in enumerate(header):
        shown.add_column(name, justify="left" if index < 2 else "right")
    for row in rows:
        shown.add_row(*row)
    return shown


def table_as_markdown(table: DrafterTable) -> str:
    """A page: what was run, where, the figures, and which way was the fastest."""
    header, rows = _cells(table)
    facts = [
        ("command", f"`{table.command}`" if table.command else "none"),
        ("data", f"{table.data}, {table.num_examples} examples, seed {table.seed}"),
        ("decoding", f"greedy, at most {table.max_tokens} tokens, {table.repeats} timed repeats, in turns"),
        *((model.role, describe_model(model)) for model in table.models),
        *describe_hardware(table.machine),
    ]
    lines = [f"# Sources of drafts: {table.task}", "", *(f"- {name}: {value}" for name, value in facts), ""]
    lines += [*markdown_table(header, rows), "", *verdicts(table), "", _LEGEND.format(in_flight=table.in_flight), ""]
    return "\n".join(lines)


def verdicts(table: DrafterTable) -> list[str]:
    """Which way is the fastest, and which of the model's and the target's: also where the model loses."""
    found = []
    for together, label in ((False, "one request at a time"), (True, f"{table.in_flight} in flight")):
        ranked = sorted(table.rows, key=lambda row: _speed(row, together), reverse=True)
        best = {role: next(row for row in ranked if row.model == role) for role in {row.model for row in table.rows}}
        text = f"Fastest with {label}: {_titled(ranked[0])}, {_speed(ranked[0], together):.1f} tokens/s"
        others = [f"{_titled(row)} {_speed(row, together):.1f}" for row in best.values() if row is not ranked[0]]
        found.append(f"- {text}{' (' + ', '.join(others) + ')' if others else ''}.")
    slower = [row for row in table.rows if row.speedup < 1 or row.speedup_together < 1]
    if slower:
        found.append(f"- Slower than AR somewhere: {', '.join(_titled(row) for row in slower)}.")
    return found


def save_picture(table: DrafterTable, path: Path) -> None:
    """Speed over AR by memory beyond the model's; a point for each way, one request at a time and several.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'cllm-server[train]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for role, marker in zip(dict.fromkeys(row.model for row in table.rows), "os^", strict=False):
        rows = [row for row in table.rows if row.model == role]
        memory = [row.num_bytes / _MIB for row in rows]
        for together, colour, label in (
            (False, "#38761d", "one request at a time"),
            (True, "#45b6c9", f"{table.in_flight} in flight"),
        ):
            speeds = [row.speedup_together if together else row.speedup for row in rows]
            axes.scatter(memory, speeds, c=colour, marker=marker, label=f"{role}, {label}", alpha=0.8)
        for row, x in zip(rows, memory, strict=True):
            axes.annotate(row.name, (x, row.speedup), textcoords="offset points", xytext=(6, 4), fontsize=7)
    axes.axhline(1.0, color="#999999", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1.0)
    largest = max(row.num_bytes for row in table.rows) / _MIB
    axes.set_xlim(-0.3, max(10.0, 10 * largest))  # names stand to the right of their points
    axes.set_xlabel("memory beyond the model's, MiB")
    axes.set_ylabel("tokens/s over AR")
    axes.set_title(f"{table.task}, {table.num_examples} examples")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def _speed(row: DrafterRow, together: bool) -> float:
    return row.tokens_per_second_together if together else row.tokens_per_second


def _titled(row: DrafterRow) -> str:
    return f"{row.model} with {row.name}"


def _cells(table: DrafterTable) -> tuple[list[str], Sequence[list[str]]]:
    measures = list(table.rows[0].scores)
    header = ["model", "drafters", *(f"{name} %" for name in measures), "equal to AR %", "TPF", "tokens/s", "over AR"]
    header += [
        f"tokens/s, {table.in_flight}",
        f"over AR, {table.in_flight}",
        "MiB",
        "MiB measured",
        "training",
        "lines",
    ]
    rows = [
        [
            row.model,
            row.name,
            *(f"{100 * row.scores[name]:.1f}" for name in measures),
            f"{100 * row.same_as_ar:.0f}",
            f"{row.tokens_per_forward:.2f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.speedup:.2f}",
            f"{row.tokens_per_second_together:.1f}",
            f"{row.speedup_together:.2f}",
            f"{row.num_bytes / _MIB:.1f}",
            f"{row.resident_bytes / _MIB:.1f}",
            row.training or "-",
            str(row.num_lines),
        ]
        for row in table.rows
    ]
    return header, rows


_LEGEND = """\
drafters: each source alone, then all; AR drafts nothing. Where a source ends before the block does, or knows nothing,
known text fills the draft, in all rows: the TPF of a source alone holds that of copies in part. TPF: accepted tokens
per forward pass, one request at a time, prefill not counted. tokens/s: prefill included, one request at a time and
{in_flight} in flight; over AR: with the same model, in turns in one engine. Window lengths are chosen as on a server.
Prompts and outputs of earlier turns of the same way are in the prefix cache and among past outputs, those of other ways
and repeats are not. MiB: weights and cache beyond the model's, counted, and by which memory grew. training: as given.
lines: of code, without what all share."""
