"""What a CPU's users notice beside tokens per second: prompts, sampling, long prompts beside streams, busy neighbours.

    python -m benchmarks.cpu MODEL --output DIR [--prompts FILE | --spider dev.json --tables tables.json]
        [--llama-bench PROGRAM --gguf FILE] [--rounds 5]

Everything runs in this process, through the engine as a server drives it; llama-bench, of the same weights, runs
between the rounds. Writes DIR/cpu.json and DIR/cpu.md. CLLM_CPU_ISA chooses the instruction set.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from benchmarks.served.prompts import read_prompts, spider_prompts
from cllm_core import LLM, SamplingParams
from cllm_core.engine.engine import Engine
from cllm_core.engine.named_tokens import NamedTokens
from cllm_core.engine.sampling import sample
from cllm_core.engine.sampling_batch import RowSampling, SamplingBatch
from cllm_core.errors import ConfigError
from cllm_core.evaluation.machine import Machine, describe_machine
from cllm_core.heap import freeze_garbage_collector
from cllm_core.request import NewRequest
from server.cli.options import load_settings
from server.engine_settings import EngineSettings

PROMPT_SIZES = (128, 512)
LONG_PROMPT = 4000
NUM_SAMPLED = 16
NUM_IN_FLIGHT = 64
NUM_COMPARED = 32
BATCH = 16
MAX_TOKENS = 64

_QUESTIONS = Path(__file__).parent / "prompts" / "questions.jsonl"
_SPIN = "while True: pass"


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """A figure beside what it should be; `details` are the figures that it was made of, by name, in `unit`."""

    name: str
    value: str
    must: str
    aim: str
    unit: str
    details: dict[str, float]


class CpuBench(msgspec.Struct, frozen=True, kw_only=True):
    """All results of a run."""

    machine: Machine
    model: str
    paths: str
    num_rounds: int
    load_average: float
    command: list[str]
    goals: list[Goal]


@dataclass(frozen=True, slots=True)
class Peer:
    """llama-bench on the same weights."""

    program: Path
    gguf: Path

    def prompt_speeds(self, num_threads: int) -> dict[int, float]:
        """Prompt tokens per second by length of the prompt; raises CalledProcessError where it fails."""
        sizes = ",".join(map(str, PROMPT_SIZES))
        done = subprocess.run(
            [self.program, "-m", self.gguf, "-p", sizes, "-n", "0", "-t", str(num_threads), "-r", "3", "-o", "json"],
            capture_output=True,
            check=True,
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(self.program.parent)},
        )
        return {entry["n_prompt"]: entry["avg_ts"] for entry in json.loads(done.stdout)}


def measure_prompts(engine: Engine, peer: Peer | None, num_rounds: int) -> list[Goal]:
    """Prompt tokens per second, whole prompts, one at a time."""
    ours: dict[int, list[float]] = {size: [] for size in PROMPT_SIZES}
    theirs: dict[int, list[float]] = {size: [] for size in PROMPT_SIZES}
    for _ in range(num_rounds):
        for size in PROMPT_SIZES:
            ours[size].append(size / _seconds_to_read(engine, size))
        if peer is not None:
            for size, speed in peer.prompt_speeds(torch.get_num_threads()).items():
                theirs[size].append(speed)
    goals = []
    for size in PROMPT_SIZES:
        details = {"engine": statistics.median(ours[size])}
        value = f"{details['engine']:.0f} tokens/s"
        if theirs[size]:
            details["llama-bench"] = statistics.median(theirs[size])
            value = f"{details['engine'] / details['llama-bench']:.2f}x"
        name = f"prompt tokens/s over llama-bench pp{size}"
        goals.append(Goal(name=name, value=value, must="1.2x", aim="1.6x", unit="tokens/s", details=details))
    return goals


def _seconds_to_read(engine: Engine, size: int) -> float:
    request = _request(_random_prompt(engine, size), SamplingParams(temperature=0, max_tokens=1, block_length=1))
    started = time.perf_counter()
    _run(engine, [request])
    return time.perf_counter() - started


def measure_sampling(llm: LLM, prompt: str, num_rounds: int) -> Goal:
    """Time to choose tokens for as many positions, greedy and sampled."""
    logits = _real_logits(llm, prompt)
    sampling = llm.engine.runner.sampling
    ways = {"greedy": SamplingParams(temperature=0), "temperature 1, top-p 0.95": SamplingParams(top_p=0.95)}
    milliseconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(20 * num_rounds):
        for name, params in ways.items():
            row = RowSampling(
                params=params,
                named=NamedTokens.of(params),
                seed=1,
                num_positions=len(logits),
                first_output_position=0,
            )
            started = time.perf_counter()
            sample(logits, SamplingBatch.build([row], logits.device), sampling)
            milliseconds[name].append(1e3 * (time.perf_counter() - started))
    details = {name: statistics.median(values) for name, values in milliseconds.items()}
    greedy, sampled = details.values()
    name = f"{NUM_SAMPLED} sampled positions at temperature 1 with top-p, over greedy"
    value = f"+{sampled - greedy:.2f} ms"
    return Goal(name=name, value=value, must="+1 ms", aim="+0.3 ms", unit="ms", details=details)


def _real_logits(llm: LLM, prompt: str) -> torch.Tensor:
    """[NUM_SAMPLED, V] along an answer: top-p takes longest where logits are flat, which those of answers are not."""
    seen: list[torch.Tensor] = []
    model = llm.engine.runner.model
    forward = model.forward

    def keep(*arguments: object) -> torch.Tensor:
        seen.append(forward(*arguments).clone())  # type: ignore[arg-type]
        return seen[-1]

    model.forward = keep  # type: ignore[method-assign,assignment]
    try:
        params = SamplingParams(temperature=0, max_tokens=NUM_SAMPLED, block_length=1, ignore_eos=True)
        llm.chat([{"role": "user", "content": prompt}], params, progress=False)
    finally:
        del model.forward
    return torch.cat(seen)[:NUM_SAMPLED]


def measure_stalls(engine: Engine, num_rounds: int) -> Goal:
    """Time between what a running stream gets while a long prompt is read."""
    gaps: list[float] = []
    for _ in range(num_rounds):
        stream = _request(
            _random_prompt(engine, 50), SamplingParams(temperature=0, max_tokens=None, block_length=1, ignore_eos=True)
        )
        engine.add_request(stream)
        for _ in range(20):
            engine.step()
        long = _request(_random_prompt(engine, LONG_PROMPT), SamplingParams(temperature=0, max_tokens=1))
        engine.add_request(long)
        last, is_read = time.perf_counter(), False
        while not is_read:
            outputs = {output.request_id: output for output in engine.step()}
            now = time.perf_counter()
            if stream.request_id in outputs:
                gaps.append(1e3 * (now - last))
                last = now
            is_read = long.request_id in outputs
        engine.abort(stream.request_id)
        engine.step()
    p50, p99 = np.percentile(gaps, [50, 99])
    return Goal(
        name=f"time between chunks of a running stream while a prompt of {LONG_PROMPT} tokens is read, p99",
        value=f"{p99:.0f} ms",
        must="150 ms",
        aim="60 ms",
        unit="ms",
        details={"p50": float(p50), "p99": float(p99), "most": max(gaps)},
    )


def measure_equality(llm: LLM, prompts: Sequence[str]) -> list[Goal]:
    """Share of texts that are the same alone, in a batch, and with the prompts' prefixes cached."""
    goals = []
    for name, params in (
        ("greedy", SamplingParams(temperature=0, max_tokens=MAX_TOKENS)),
        ("seeded", SamplingParams(seed=7, max_tokens=MAX_TOKENS)),
    ):
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts[:NUM_COMPARED]]
        batch = _texts(llm, asked, params)
        again = _texts(llm, asked, params)  # prefixes cached by now
        alone = [_texts(llm, [one], params)[0] for one in asked]
        same = [a == b == c for a, b, c in zip(alone, batch, again, strict=True)]
        share = sum(same) / len(same)
        goals.append(
            Goal(
                name=f"{name} texts equal alone, in a batch of {BATCH} and cached, {llm.info.number_format}",
                value=f"{share:.0%}",
                must="100 %",
                aim="100 %",
                unit="texts",
                details={"equal": sum(same), "compared": len(same)},
            )
        )
    return goals


def _texts(llm: LLM, asked: Sequence[Sequence[dict[str, str]]], params: SamplingParams) -> list[tuple[int, ...]]:
    return [result.outputs[0].token_ids for result in llm.chat(asked, params, progress=False)]


def measure_neighbour(llm: LLM, prompts: Sequence[str], num_rounds: int) -> Goal:
    """Tokens per second with many in flight: all threads beside a program that keeps a core busy, one thread alone."""
    num_threads = torch.get_num_threads()
    beside, alone = [], []
    for index in range(num_rounds):
        some = [prompts[(index * NUM_IN_FLIGHT + i) % len(prompts)] for i in range(NUM_IN_FLIGHT)]
        with _busy_core():
            beside.append(_tokens_per_second(llm, some, salt=f"beside {index}"))
        torch.set_num_threads(1)
        alone.append(_tokens_per_second(llm, some, salt=f"alone {index}"))
        torch.set_num_threads(num_threads)
    details = {
        f"{num_threads} threads beside a busy core": statistics.median(beside),
        "1 thread, nothing else": statistics.median(alone),
    }
    ratio = statistics.median(one / other for one, other in zip(beside, alone, strict=True))
    name = f"{NUM_IN_FLIGHT} in flight beside a program that keeps one core busy, over one thread and no neighbour"
    return Goal(name=name, value=f"{ratio:.2f}x", must="0.9x", aim="1.2x", unit="tokens/s", details=details)


def _tokens_per_second(llm: LLM, prompts: Sequence[str], *, salt: str) -> float:
    # What other rounds computed of a prompt must not be found again.
    asked = [[{"role": "user", "content": f"{salt}\n{prompt}"}] for prompt in prompts]
    started = time.perf_counter()
    texts = _texts(llm, asked, SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True))
    return sum(map(len, texts)) / (time.perf_counter() - started)


@contextmanager
def _busy_core() -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes on the last core while the block runs."""
    cores = sorted(os.sched_getaffinity(0))
    process = subprocess.Popen([sys.executable, "-c", _SPIN])
    try:
        os.sched_setaffinity(process.pid, cores[-1:])
        time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def _request(prompt_ids: tuple[int, ...], params: SamplingParams) -> NewRequest:
    number = str(time.monotonic_ns())
    return NewRequest(request_id=number, prompt_ids=prompt_ids, params=params, cache_salt=number)


def _random_prompt(engine: Engine, size: int) -> tuple[int, ...]:
    generator = np.random.default_rng(time.monotonic_ns())
    return tuple(generator.integers(100, engine.info.vocab_size - 100, size).tolist())


def _run(engine: Engine, requests: Sequence[NewRequest]) -> None:
    for request in requests:
        engine.add_request(request)
    while engine.has_work():
        engine.step()


def bench_cpu(
    model: str, prompts: Sequence[str], peer: Peer | None, *, num_rounds: int, command: list[str]
) -> CpuBench:
    """Measure a model on this machine, alone on it."""
    load_average = os.getloadavg()[0]
    # As a server runs, but for room for all requests at once and for one step to hold a prompt of the peer's size.
    given: dict[str, object] = {"model": model, "max_num_seqs": NUM_IN_FLIGHT}
    settings = msgspec.to_builtins(load_settings(EngineSettings, given).to_engine_config())
    llm = LLM(**settings)
    _warm_up(llm, prompts)
    freeze_garbage_collector()  # as the worker does: a whole collection takes 0.2 s
    goals = [
        *measure_prompts(llm.engine, peer, num_rounds),
        measure_sampling(llm, prompts[0], num_rounds),
        measure_stalls(llm.engine, num_rounds),
        measure_neighbour(llm, prompts, num_rounds),
    ]
    for quantization in (None, "int8"):
        with suppress(ConfigError):  # int8: what the model's path says
            batched = LLM(**settings | {"max_num_seqs": BATCH, "quantization": quantization})
            goals += measure_equality(batched, prompts)
    return CpuBench(
        machine=describe_machine(),
        model=llm.info.name,
        paths=str(llm.info.paths),
        num_rounds=num_rounds,
        load_average=load_average,
        command=command,
        goals=goals,
    )


def _warm_up(llm: LLM, prompts: Sequence[str]) -> None:
    _tokens_per_second(llm, prompts[:BATCH], salt="warm-up")


def as_markdown(bench: CpuBench) -> str:
    """The results as a page."""
    machine = bench.machine
    lines = [
        f"# CPU: {bench.model}",
        "",
        f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads; torch {machine.torch}; commit "
        f"{machine.commit}; {machine.date}; load average {bench.load_average:.1f}. Medians of "
        f"{bench.num_rounds} rounds. {bench.paths}.",
        "",
        "```",
        " ".join(bench.command),
        "```",
        "",
        "| | measured | must | aim | made of |",
        "| --- | --- | --- | --- | --- |",
    ]
    for goal in bench.goals:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in goal.details.items())
        lines.append(f"| {goal.name} | {goal.value} | {goal.must} | {goal.aim} | {parts} ({goal.unit}) |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `cllm serve` loads")
    parser.add_argument("--output", type=Path, required=True, help="folder for cpu.json and cpu.md")
    parser.add_argument("--prompts", type=Path, default=_QUESTIONS, help='JSON lines with a "prompt" each')
    parser.add_argument("--spider", type=Path, help="Spider's dev.json in place of --prompts; needs --tables")
    parser.add_argument("--tables", type=Path, help="Spider's tables.json")
    parser.add_argument("--llama-bench", type=Path, help="the program of llama.cpp; needs --gguf")
    parser.add_argument("--gguf", type=Path, help="the same model by `cllm export --format gguf`")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    if (given.llama_bench is None) != (given.gguf is None) or (given.spider is None) != (given.tables is None):
        parser.error("--llama-bench and --gguf belong together, and --spider and --tables")
    peer = None if given.llama_bench is None else Peer(given.llama_bench.absolute(), given.gguf)
    prompts = read_prompts(given.prompts) if given.spider is None else spider_prompts(given.spider, given.tables)
    given.output.mkdir(parents=True, exist_ok=True)
    words = [Path(word).name if Path(word).is_absolute() else word for word in arguments or sys.argv[1:]]
    bench = bench_cpu(
        given.model, prompts, peer, num_rounds=given.rounds, command=["python", "-m", "benchmarks.cpu", *words]
    )
    (given.output / "cpu.json").write_bytes(msgspec.json.format(msgspec.json.encode(bench)) + b"\n")
    page = as_markdown(bench)
    (given.output / "cpu.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
