"""Pictures of the comparison: throughput and latency over requests in flight."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.served.measure import Measured
from benchmarks.served.summary import Figures, median_figures

_LATENCIES: tuple[tuple[str, Callable[[Figures], float]], ...] = (
    ("to the first token, p50 (s)", lambda figures: figures.first_token.p50),
    ("per token, p50 (s)", lambda figures: figures.inter_token.p50),
    ("end to end, p50 (s)", lambda figures: figures.end_to_end.p50),
    ("end to end, p95 (s)", lambda figures: figures.end_to_end.p95),
)


def draw(results: Sequence[Measured], folder: Path) -> None:
    """Write throughput.png and latency.png."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    _draw_lines(figure.subplots(), results, "output tokens/s", lambda one: one.output_tokens_per_second)
    figure.savefig(folder / "throughput.png", dpi=120)
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (label, value) in zip(figure.subplots(2, 2).flat, _LATENCIES, strict=True):
        _draw_lines(axes, results, label, value)
    figure.savefig(folder / "latency.png", dpi=120)


def _draw_lines(axes: Axes, results: Sequence[Measured], label: str, value: Callable[[Figures], float]) -> None:
    """A line for each server through the medians, with the range over the rounds around it."""
    concurrencies = sorted({one.concurrency for one in results})
    for server in dict.fromkeys(one.server for one in results):
        own = sorted((one for one in results if one.server == server), key=lambda one: one.concurrency)
        x = [one.concurrency for one in own]
        axes.plot(x, [value(median_figures(one.rounds)) for one in own], marker="o", label=server)
        low, high = ([bound(map(value, one.rounds)) for one in own] for bound in (min, max))
        axes.fill_between(x, low, high, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(concurrencies, [str(number) for number in concurrencies])
    axes.set_xlabel("requests in flight")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
