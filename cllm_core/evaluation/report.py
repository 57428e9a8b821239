"""The results of an evaluation as JSON, Markdown and a table for the terminal. No torch in here."""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cllm_core.evaluation.machine import Machine
from cllm_core.evaluation.summary import LOOP_LENGTH, MAX_VARIED_REPETITION, Cell, Comparison, best_cell

JSON_FILE = "results.json"
MARKDOWN_FILE = "results.md"


class ModelDescription(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was evaluated."""

    role: str
    name: str
    adapter: str | None
    num_parameters: int
    device: str
    dtype: str
    domain: str | None


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """All that an evaluation found.

    Attributes:
        task, data: what was answered.
        command: that was run, "" where it was no command.
        num_examples: answered by every model at every block length.
        seed, repeats, max_tokens: of the run; repeats is 0 where times were not measured.
        cached_prefixes: whether what prompts share was in the prefix cache when times were taken.
        reference: model whose perplexity is reported, None where it is not.
        models, cells: what was compared, and the figures.
        comparison: model over target, None without a target.
    """

    task: str
    data: str
    command: str
    num_examples: int
    seed: int
    repeats: int
    max_tokens: int
    machine: Machine
    models: tuple[ModelDescription, ...]
    cells: tuple[Cell, ...]
    comparison: Comparison | None = None
    cached_prefixes: bool = False
    reference: str | None = None


def save(results: Results, folder: Path) -> None:
    """Write results.json and results.md."""
    (folder / JSON_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    (folder / MARKDOWN_FILE).write_text(as_markdown(results), encoding="utf-8")


def as_table(results: Results) -> Table:
    """For the terminal. * marks the best block length of each model."""
    table = Table(title=f"{results.task}, {results.num_examples} examples", box=SIMPLE_HEAD, pad_edge=False)
    header, rows = _rows(results)
    for index, name in enumerate(header):
        table.add_column(name.replace(" ", "\n"), justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(results: Results) -> str:
    """A page: what was run, where, and the figures."""
    header, rows = _rows(results)
    lines = [f"# Evaluation: {results.task}", "", *_facts(results), "", *markdown_table(header, rows)]
    if results.comparison is not None:
        lines += ["", "## CLLM over target", "", *markdown_table(["figure", "value"], comparison_rows(results))]
    return "\n".join([*lines, "", _LEGEND, ""])


def comparison_rows(results: Results) -> list[list[str]]:
    """Name and value of each figure of the comparison; none where there is none."""
    comparison = results.comparison
    if comparison is None:
        return []
    lengths = f"n = {comparison.model_block_length} / {comparison.target_block_length}"
    rows = [[f"{name}, difference in points", f"{100 * value:+.1f}"] for name, value in comparison.scores.items()]
    ratios = (
        (f"tokens per forward pass ({lengths})", comparison.tokens_per_forward),
        ("tokens per second over AR in the same engine", comparison.speedup),
        ("fast-forwarded per block", comparison.fast_forwarded),
        ("stationary per block", comparison.stationary),
        ("perplexity of answers", comparison.perplexity),
    )
    rows += [[name, f"{value:.2f}x"] for name, value in ratios if value is not None]
    return [*rows, ["repetition (rep-4), difference", f"{comparison.repetition:+.3f}"]]


def _rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """A column per cell and a row per figure, which fits a terminal: there are many figures and few cells."""
    best = [best_cell(results.cells, model.role) for model in results.models]
    header = ["", *(f"{cell.model} n={cell.block_length}{'*' if cell in best else ''}" for cell in results.cells)]
    measures = [
        [f"{name} %", *(f"{100 * cell.scores[name]:.1f}" for cell in results.cells)] for name in results.cells[0].scores
    ]
    figures = [(name, [read(cell) for cell in results.cells], form) for name, read, form in _FIGURES]
    known = [figure for figure in figures if any(value is not None for value in figure[1])]
    rows = [[name, *("" if value is None else format(value, form) for value in values)] for name, values, form in known]
    return header, measures + rows


_FIGURES: tuple[tuple[str, Callable[[Cell], float | None], str], ...] = (
    ("TPF", lambda cell: cell.tokens_per_forward, ".2f"),
    ("TPF, all passes", lambda cell: cell.tokens_per_forward_all, ".2f"),
    ("TPF, without loops", lambda cell: cell.tokens_per_forward_varied, ".2f"),
    ("tokens/s", lambda cell: cell.tokens_per_second, ".1f"),
    ("speedup", lambda cell: cell.speedup, ".2f"),
    ("decode tokens/s", lambda cell: cell.decode_tokens_per_second, ".1f"),
    ("decode speedup", lambda cell: cell.decode_speedup, ".2f"),
    ("fast-forwarded/block", lambda cell: cell.fast_forwarded_per_block, ".2f"),
    ("stationary/block", lambda cell: cell.stationary_per_block, ".2f"),
    ("table 3, right/iteration", lambda cell: cell.paper_fast_forwarded, ".2f"),
    ("table 3, stationary", lambda cell: cell.paper_stationary, ".2f"),
    ("perplexity", lambda cell: cell.perplexity, ".3f"),
    ("repetition (rep-4)", lambda cell: cell.repetition, ".3f"),
    ("tokens per answer", lambda cell: cell.mean_tokens, ".1f"),
    ("finished %", lambda cell: 100 * cell.finished, ".0f"),
    ("equal to AR %", lambda cell: 100 * cell.same_as_ar, ".0f"),
)

_LEGEND = f"""\
n: block length, 1 is AR, * the best above it. TPF: accepted tokens per forward pass, prefill not counted; "all passes"
counts every pass that yields tokens; "without loops" leaves out answers whose rep-4 exceeds {MAX_VARIED_REPETITION}.
tokens/s: median over the examples, one request at a time; speedup: median over the examples against n = 1 of the same
model, measured in turns; "decode" leaves the first pass out. Fast-forwarded and stationary tokens are per n tokens of
output; "table 3" are the units of the paper: newly right tokens per iteration, AR's one included, and stationary tokens
per n, as means over the answers without a token {LOOP_LENGTH} times in a row. Perplexity: of the answers, under the
reference. Equal to AR: share of answers that are, token for token, the same model's at n = 1."""


def _facts(results: Results) -> list[str]:
    facts = [
        ("command", f"`{results.command}`" if results.command else "none"),
        ("data", f"{results.data}, {results.num_examples} examples, seed {results.seed}"),
        ("decoding", f"greedy, at most {results.max_tokens} tokens, {results.repeats} timed repeats"),
        (
            "prompts",
            "what another example begins with, too, in the prefix cache"
            if results.cached_prefixes
            else "computed whole",
        ),
        *((model.role, describe_model(model)) for model in results.models),
        *([("reference of perplexity", results.reference)] if results.reference else []),
        *describe_hardware(results.machine),
    ]
    return [f"- {name}: {value}" for name, value in facts]


def describe_hardware(machine: Machine) -> list[tuple[str, str]]:
    """Where and with what figures were measured, as facts of a page."""
    hardware = f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads, {machine.memory_gib} GiB"
    return [
        ("machine", hardware + (f", {machine.gpu}" if machine.gpu else "")),
        ("versions", f"cllm-server {machine.version}, torch {machine.torch}, Python {machine.python}"),
        ("commit", machine.commit or "unknown"),
        ("date", machine.date),
    ]


def describe_model(model: ModelDescription) -> str:
    """Name, size and number format."""
    adapter = f" with adapter {model.adapter}" if model.adapter else ""
    return f"{model.name}{adapter}, {model.num_parameters / 1e6:.0f}M parameters, {model.dtype} on {model.device}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns but the first are aligned right."""
    aligned = ["---", *("---:" for _ in header[1:])]
    return ["| " + " | ".join(row) + " |" for row in (header, aligned, *rows)]
