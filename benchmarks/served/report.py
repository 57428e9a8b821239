"""The comparison as a page and as JSON."""

from collections.abc import Iterator, Sequence

import msgspec

from benchmarks.served.engine_alone import NAME as ENGINE_ALONE
from benchmarks.served.measure import Measured
from benchmarks.served.servers import AR, JACOBI, LLAMA, TRANSFORMERS
from benchmarks.served.summary import Figures, median_figures, median_ratio
from cllm_core.evaluation.machine import Machine


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, beside the figures.

    Attributes:
        model: as it was named.
        prompts: where they came from.
        repeats_prompts: whether there were too few for every load, so that servers met one again.
        load_average: of the machine before the start, over a minute.
        isa: instruction set of this engine's C kernels, None where it has none.
        versions: of the servers, as they tell.
        command: words of the command line.
    """

    model: str
    prompts: str
    repeats_prompts: bool
    num_requests: int
    num_rounds: int
    max_tokens: int
    load_average: float
    isa: str | None
    versions: dict[str, str]
    command: list[str]


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that is to be reached, over output tokens per second; `must` and `aim` as the goals were set."""

    name: str
    value: float
    must: str
    aim: str
    is_share: bool = False

    @property
    def text(self) -> str:
        """The value as it is read."""
        return f"{self.value:.1%}" if self.is_share else f"{self.value:.2f}x"


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All that is kept of a run."""

    machine: Machine
    setting: Setting
    results: list[Measured]
    ratios: list[Ratio]


_OVER_AR = {1: "2.4x", 4: "2x", 16: "1.3x", 32: "1x"}
_OVER_OTHERS = (
    (AR, LLAMA, 1, "1.15x", "1.4x"),
    (JACOBI, LLAMA, 1, "3x", "4x"),
    (JACOBI, LLAMA, 16, "4x", "6x"),
    (JACOBI, TRANSFORMERS, 1, "4x", "8x"),
)


def ratios_of(results: Sequence[Measured]) -> list[Ratio]:
    """The ratios whose two sides were both measured."""
    rounds = {(one.server, one.concurrency): one.rounds for one in results}
    served = rounds.get((JACOBI, 1))
    found = []
    # llama-server with drafts has no goals of its own: what it is at its best is what users would compare with.
    variants = {server for server, _ in rounds if server.startswith(f"{LLAMA}, ")}
    with_drafts = [(JACOBI, name, concurrency, "", "") for name in sorted(variants) for concurrency in (1, 16)]
    for ours, other, concurrency, must, aim in (*_OVER_OTHERS, *with_drafts):
        if (ours, concurrency) in rounds and (other, concurrency) in rounds:
            value = median_ratio(rounds[ours, concurrency], rounds[other, concurrency])
            found.append(Ratio(name=f"{ours} over {other}, concurrency {concurrency}", value=value, must=must, aim=aim))
    for (server, concurrency), jacobi in rounds.items():
        if server == JACOBI and (AR, concurrency) in rounds:
            value = median_ratio(jacobi, rounds[AR, concurrency])
            aim = _OVER_AR.get(concurrency, "")
            found.append(Ratio(name=f"{JACOBI} over {AR}, concurrency {concurrency}", value=value, must="1x", aim=aim))
    if served and (ENGINE_ALONE, 1) in rounds:
        value = 1 - median_ratio(served, rounds[ENGINE_ALONE, 1])
        name = f"cost of HTTP and IPC: {JACOBI} below {ENGINE_ALONE}, concurrency 1"
        found.append(Ratio(name=name, value=value, must="8%", aim="4%", is_share=True))
    return found


def as_markdown(comparison: Comparison) -> str:
    """The page, with the plots that lie beside it."""
    return "\n".join([*_heading(comparison), *_ratio_table(comparison.ratios), *_tables(comparison.results), ""])


def _heading(comparison: Comparison) -> Iterator[str]:
    machine, setting = comparison.machine, comparison.setting
    yield f"# Served: {setting.model}"
    yield ""
    gpu = f", {machine.gpu}" if machine.gpu else ""
    yield (
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB{gpu}; C kernels: {setting.isa or 'none'}; "
        f"commit {machine.commit}; "
        f"{machine.date}; load average {setting.load_average:.1f}; {_listed(setting.versions)}."
    )
    yield ""
    yield (
        f"{setting.prompts}, greedy, at most {setting.max_tokens} tokens, {setting.num_requests} requests a load or as "
        f"many as are in flight, medians of {setting.num_rounds} rounds in turns."
        + (" Prompts repeat: caches of prompts count." if setting.repeats_prompts else "")
    )
    yield from ["", "```", " ".join(setting.command), "```", ""]


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _ratio_table(ratios: Sequence[Ratio]) -> Iterator[str]:
    if not ratios:
        return
    yield "Output tokens per second, within a round:"
    yield from ["", "| | measured | must | aim |", "| --- | --- | --- | --- |"]
    for ratio in ratios:
        yield f"| {ratio.name} | {ratio.text} | {ratio.must} | {ratio.aim} |"
    yield ""


def _tables(results: Sequence[Measured]) -> Iterator[str]:
    for concurrency in sorted({one.concurrency for one in results}):
        yield f"## {concurrency} in flight"
        yield ""
        yield (
            "| | tokens/s | requests/s | TTFT p50 / p95, ms | per token p50 / p95, ms | end to end p50 / p95, s | TPF "
            "| same text |"
        )
        yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
        for one in results:
            if one.concurrency == concurrency:
                yield _row(one, median_figures(one.rounds))
        yield ""
    yield "![Output tokens per second over requests in flight](throughput.png)"
    yield ""
    yield "![Latencies over requests in flight](latency.png)"


def _row(one: Measured, figures: Figures) -> str:
    tpf = "-" if figures.tokens_per_forward is None else f"{figures.tokens_per_forward:.2f}"
    first, token, whole = figures.first_token, figures.inter_token, figures.end_to_end
    return (
        f"| {one.server} | {figures.output_tokens_per_second:.1f} | {figures.requests_per_second:.2f} "
        f"| {1e3 * first.p50:.0f} / {1e3 * first.p95:.0f} | {1e3 * token.p50:.1f} / {1e3 * token.p95:.1f} "
        f"| {whole.p50:.2f} / {whole.p95:.2f} | {tpf} | {one.same_text:.0%} |"
    )
