"""The comparison itself: all servers under the same loads, in turns, round by round."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.served.engine_alone import NAME as ENGINE_ALONE
from benchmarks.served.engine_alone import EngineAlone, engine_alone
from benchmarks.served.prompts import PromptSupply
from benchmarks.served.records import Answer, BenchmarkError, LoadJob
from benchmarks.served.servers import Endpoint, ServerSpec, running
from benchmarks.served.summary import Figures, figures_of, require_whole, share_of_same_text
from cllm_core.config import EngineConfig
from cllm_core.models.checkpoint import read_config, read_tokenizer
from cllm_core.models.loader import tokenizer_source
from cllm_core.models.source import resolve_source
from cllm_core.models.tokenizer import build_bundle
from cllm_core.text.codec import TextCodec

_WARM_UP_TOKENS = 16

Ask = Callable[[list[str], int, int], list[Answer]]  # prompts, concurrency, max_tokens
CountTokens = Callable[[str], int]
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
        model: settings of the model that all serve; its tokenizer counts what no server tells.
        logs: existing folder for what the servers write.
    """

    servers: Sequence[ServerSpec]
    engine: EngineConfig | None
    concurrencies: Sequence[int]
    num_requests: int
    num_rounds: int
    max_tokens: int
    model: EngineConfig
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
        ModelLoadError: the model's tokenizer cannot be had; found out before anything is started.
    """
    count_tokens = token_counter(plan.model)
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
        answers = _ask_in_turns(plan, ways, supply, report)
    first = next(iter(ways))
    return [
        Measured(
            server=name,
            concurrency=concurrency,
            rounds=[figures_of(one, count_tokens) for one in rounds],
            same_text=share_of_same_text(_numbered(rounds), _numbered(answers[first, concurrency])),
        )
        for (name, concurrency), rounds in answers.items()
    ]


def token_counter(model: EngineConfig) -> CountTokens:
    """Counts the tokens of a text as the model's tokenizer splits it, without those put around a text.

    Raises:
        ModelLoadError: the tokenizer cannot be had.
    """
    source = resolve_source(model, lambda stage, fraction: None)
    tokenizer = read_tokenizer(tokenizer_source(source), read_config(source.checkpoint))
    codec = TextCodec(build_bundle(tokenizer, model_name=source.name))
    return lambda text: len(codec.encode(text, add_special_tokens=False))


def _ask_in_turns(
    plan: Plan, ways: dict[str, Ask], supply: PromptSupply, report: Report
) -> dict[tuple[str, int], list[list[Answer]]]:
    """The answers of every round, by server and concurrency."""
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
    return answers


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


def _log(plan: Plan, name: str) -> Path:
    return plan.logs / f"{name.replace(' ', '-')}.log"
