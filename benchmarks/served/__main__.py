"""Servers compared over HTTP: the same prompts, the same loads, in turns, medians of several rounds.

    python -m benchmarks.served MODEL --output DIR

benchmarks/README.md has the whole recipe. Writes served.json, served.md, throughput.png and latency.png.
"""

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import msgspec
import psutil
import typer

from benchmarks.served.config import ServedConfig
from benchmarks.served.measure import Measured, Plan, Report, measure
from benchmarks.served.plots import draw
from benchmarks.served.prompts import PromptSupply, read_prompts, spider_prompts
from benchmarks.served.report import Comparison, Setting, as_markdown, ratios_of
from benchmarks.served.servers import (
    AR,
    JACOBI,
    LLAMA,
    ServerSpec,
    cllm_server,
    llama_server,
    transformers_server,
    version_of,
)
from cllm_core.backends.cpu.library import load_kernels
from cllm_core.cli.command import exit_with
from cllm_core.cli.struct_options import struct_command
from cllm_core.config import EngineConfig
from cllm_core.errors import CllmError
from cllm_core.evaluation.machine import describe_machine
from cllm_core.models.embedded import cache_folder
from server.cli.options import load_settings
from server.engine_settings import ENV_PREFIX, EngineSettings

_QUESTIONS = Path(__file__).parent.parent / "prompts" / "questions.jsonl"


def main() -> None:
    """Run the command line."""
    # unwinds, so that the servers end with the benchmark
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(struct_command(compare, ServedConfig))
    app()


def compare(config: ServedConfig) -> None:
    """Compare servers over HTTP: the same prompts, the same loads, in turns, medians of several rounds."""
    load_average = psutil.getloadavg()[0]
    try:
        supply = PromptSupply(_read(config)[: config.limit])
        plan = plan_of(config)
        config.output.mkdir(parents=True, exist_ok=True)
        results = measure(plan, supply, _reporter())
        setting = _setting(config, plan, supply, load_average)
    except (CllmError, OSError) as error:
        exit_with(str(error))
    _write(config.output, setting, results)


def plan_of(config: ServedConfig) -> Plan:
    """What to measure."""
    length = [] if config.block_length is None else [f"--block-length={config.block_length}"]
    engine = _engine(config)
    return Plan(
        servers=_servers(config, length),
        engine=engine if config.engine_alone and 1 in config.concurrencies else None,
        concurrencies=config.concurrencies,
        num_requests=config.requests,
        num_rounds=config.rounds,
        max_tokens=config.max_tokens,
        model=engine,
        logs=config.output,
    )


def _servers(config: ServedConfig, length: list[str]) -> list[ServerSpec]:
    flags = [f"--max-num-seqs={max(config.concurrencies)}"]
    specs: list[ServerSpec] = []
    if config.ar:
        one = ["--block-length=1"]
        specs.append(cllm_server(AR, config.model, flags=[*flags, *one], num_threads=config.num_threads))
    if config.jacobi:
        specs.append(cllm_server(JACOBI, config.model, flags=[*flags, *length], num_threads=config.num_threads))
    if config.llama_server is not None and config.gguf is not None:
        for name, own in {LLAMA: "", **config.named_llama_variants}.items():
            specs.append(
                llama_server(
                    config.llama_server,
                    config.gguf,
                    name=name,
                    concurrency=max(config.concurrencies),
                    context=config.context,
                    flags=shlex.split(f"{config.llama_args} {own}"),
                    num_threads=config.num_threads,
                )
            )
    if config.transformers is not None:
        flags = shlex.split(config.transformers_args)
        specs.append(
            transformers_server(config.transformers, Path(config.model), flags=flags, num_threads=config.num_threads)
        )
    return specs + [ServerSpec(name=name, url=url) for name, url in config.named_urls.items()]


def _engine(config: ServedConfig) -> EngineConfig:
    """Settings of the engine alone: those that the Jacobi server has from its flags and the environment."""
    given: dict[str, object] = {
        "model": config.model,
        "block_length": config.block_length,
        "num_threads": config.num_threads,
        "max_num_seqs": max(config.concurrencies),
    }
    return load_settings(EngineSettings, given).to_engine_config()


def _read(config: ServedConfig) -> list[str]:
    if config.spider is not None and config.tables is not None:
        return spider_prompts(config.spider, config.tables)
    return read_prompts(config.prompts or _QUESTIONS)


def _reporter() -> Report:
    began = time.monotonic()
    return lambda line: print(f"{time.monotonic() - began:6.0f} s  {line}", file=sys.stderr, flush=True)


def _setting(config: ServedConfig, plan: Plan, supply: PromptSupply, load_average: float) -> Setting:
    source = config.spider or config.prompts or _QUESTIONS
    return Setting(
        model=Path(config.model).name,
        prompts=f"{supply.num_prompts} prompts of {source.name}",
        repeats_prompts=supply.repeats,
        num_requests=config.requests,
        num_rounds=config.rounds,
        max_tokens=config.max_tokens,
        load_average=load_average,
        isa=_isa(plan.model),
        versions={spec.name: version_of(spec) for spec in plan.servers if spec.version_command},
        command=[*_environment(), "python", "-m", "benchmarks.served", *map(_without_folders, sys.argv[1:])],
    )


def _isa(config: EngineConfig) -> str | None:
    """Instruction set of the C kernels under these settings; None without them."""
    kernels = load_kernels(cache_folder(), config.cpu_isa) if config.native_kernels else None
    return None if kernels is None else kernels.isa


def _environment() -> list[str]:
    """Settings of this server that came by the environment, keys of clients left out."""
    ours = {name: value for name, value in os.environ.items() if name.startswith(ENV_PREFIX) and "KEY" not in name}
    return [f"{name}={_without_folders(value)}" for name, value in sorted(ours.items())]


def _without_folders(word: str) -> str:
    """A word of the command line as others may read it: where files lie on this machine is of no use to them."""
    flag, equals, value = word.partition("=")
    path = value if equals else flag
    if not Path(path).is_absolute():
        return word
    return f"{flag}=" * bool(equals) + Path(path).name


def _write(folder: Path, setting: Setting, results: list[Measured]) -> None:
    comparison = Comparison(machine=describe_machine(), setting=setting, results=results, ratios=ratios_of(results))
    (folder / "served.json").write_bytes(msgspec.json.format(msgspec.json.encode(comparison)) + b"\n")
    page = as_markdown(comparison)
    (folder / "served.md").write_text(page, encoding="utf-8")
    draw(results, folder)
    print(page)


if __name__ == "__main__":
    main()
