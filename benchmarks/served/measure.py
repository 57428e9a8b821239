"""The comparison itself: all servers under the same loads, in turns, round by round."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from benchmarks.served.engine_alone import NAME as ENGINE_ALONE
from benchmarks.served.engine_alone import EngineAlone, engine_alone
from benchmarks.served.prompts import PromptSupply
from benchmarks.served.records import Answer, BenchmarkError, LoadJob
from benchmarks.served.servers import Endpoint, ServerSpec, running
from benchmarks.served.summary import Figures, figures_of, require_whole, share_of_same_text
from cllm_core.config import EngineConfig

_WARM_UP_TOKENS = 16

Ask = Callable[[list[str], int, int], list[Answer]]  # prompts, concurrency, max_tokens
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        servers: to compare, in the order of their turns.
        engine: settings of the engine that is measured alone beside them at concurrency 1; None leaves it out.
        concurrencies: loads, in requests in flight.
        num_requests: of a load, at least; a higher concurrency gets as many requests as it has in flight.
        num_rounds: times everything is measured.
        max_tokens: of an answer.
        model: folder whose tokenizer counts where a server does not.
        logs: existing folder for what the servers write.
    """

    servers: Sequence[ServerSpec]
    engine: EngineConfig | None
    concurrencies: Sequence[int]
    num_requests: int
    num_rounds: int
    max_tokens: int
    model: Path
    logs: Path


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One server under one load.

    Attributes:
        rounds: figures of each round.
        same_text: share of its texts equal to those of the first server, over all rounds.
    """

    server: str
    concurrency: int
    rounds: list[Figures]
    same_text: float


def measure(plan: Plan, supply: PromptSupply, report: Report) -> list[Measured]:
    """Start all servers, warm them up, and measure.

    Raises:
        BenchmarkError: a server does not start, a request fails, or the load tool does.
    """
    with ExitStack() as stack:
        ways: dict[str, Ask] = {}
        for spec in plan.servers:
            report(f"starting {spec.name}")
            ways[spec.name] = _over_http(stack.enter_context(running(spec, _log(plan, spec.name))))
        if plan.engine is not None:
            report(f"starting {ENGINE_ALONE}")
            ways[ENGINE_ALONE] = _directly(stack.enter_context(engine_alone(plan.engine, _log(plan, ENGINE_ALONE))))
        highest = max(plan.concurrencies)
        prompts = supply.take(highest)
        for name, ask in ways.items():
            report(f"warming up {name}")
            require_whole(name, ask(prompts, highest, _WARM_UP_TOKENS))
        return _measure_in_turns(plan, ways, supply, report)


def _measure_in_turns(plan: Plan, ways: dict[str, Ask], supply: PromptSupply, report: Report) -> list[Measured]:
    answers: dict[tuple[str, int], list[list[Answer]]] = {}
    for number in range(plan.num_rounds):
        for concurrency in plan.concurrencies:
            prompts = supply.take(max(plan.num_requests, concurrency))
            for name, ask in ways.items():
                if name == ENGINE_ALONE and concurrency > 1:
                    continue
                report(f"round {number + 1} of {plan.num_rounds}: {name}, concurrency {concurrency}")
                one = require_whole(name, ask(prompts, concurrency, plan.max_tokens))
                answers.setdefault((name, concurrency), []).append(one)
    first = next(iter(ways))
    count_tokens = _counter(plan.model)
    return [
        Measured(
            server=name,
            concurrency=concurrency,
            rounds=[figures_of(one, count_tokens) for one in rounds],
            same_text=share_of_same_text(_numbered(rounds), _numbered(answers[first, concurrency])),
        )
        for (name, concurrency), rounds in answers.items()
    ]


def _over_http(endpoint: Endpoint) -> Ask:
    def ask(prompts: list[str], concurrency: int, max_tokens: int) -> list[Answer]:
        return run_load_process(
            LoadJob(
                url=endpoint.url,
                model=endpoint.model,
                prompts=prompts,
                concurrency=concurrency,
                max_tokens=max_tokens,
                stream_options=endpoint.spec.stream_options,
            )
        )

    return ask


def _directly(engine: EngineAlone) -> Ask:
    def ask(prompts: list[str], concurrency: int, max_tokens: int) -> list[Answer]:
        del concurrency  # one at a time
        return engine.answer(prompts, max_tokens)

    return ask


def run_load_process(job: LoadJob) -> list[Answer]:
    """The answers of one load, made by Locust in a process of its own.

    Raises:
        BenchmarkError: the load tool fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        job_file, answers_file = Path(scratch) / "job.json", Path(scratch) / "answers.jsonl"
        job_file.write_bytes(msgspec.json.encode(job))
        command = [sys.executable, "-m", "benchmarks.served.load", str(job_file), str(answers_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchmarkError(f"the load tool ended with code {done.returncode}:\n{done.stderr.strip()}")
        return [msgspec.json.decode(line, type=Answer) for line in answers_file.read_bytes().splitlines()]


def _numbered(rounds: Sequence[Sequence[Answer]]) -> list[Answer]:
    """The answers of all rounds, with prompts numbered over all of them."""
    size = len(rounds[0])
    return [
        msgspec.structs.replace(answer, prompt=number * size + answer.prompt)
        for number, one in enumerate(rounds)
        for answer in one
    ]


def _counter(model: Path) -> Callable[[Answer], int]:
    """Counts the tokens of a text, and the end token where one ended it."""

    def count(answer: Answer) -> int:
        path = model / "tokenizer.json"
        if not path.is_file():
            raise BenchmarkError(f"a server tells no usage, and {path} is not there to count its tokens with")
        ended = 1 if answer.finish_reason == "stop" else 0
        return len(Tokenizer.from_file(str(path)).encode(answer.text, add_special_tokens=False).ids) + ended

    return count


def _log(plan: Plan, name: str) -> Path:
    return plan.logs / f"{name.replace(' ', '-')}.log"
