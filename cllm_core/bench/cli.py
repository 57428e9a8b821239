"""`cllm bench engine`: speed of the engine on this machine.

torch is imported when the command runs, so that `cllm --help` stays quick.
"""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cllm_core.cli.command import exit_with
from cllm_core.cli.prompt_file import read_prompt_file
from cllm_core.config import EngineConfig
from cllm_core.errors import CllmError


def engine(
    model: EngineConfig,
    *,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines with a "prompt" each. Left out: a few built-in prompts.')
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompts are messages of a user, to be answered.")] = False,
    block_lengths: Annotated[
        list[int] | None,
        typer.Option("--with-block-length", min=2, help="Jacobi block length; give it again for more."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output limit in tokens.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Times everything is measured; medians are reported.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder for engine.json and engine.md.")] = None,
) -> None:
    """Compare AR and Jacobi decoding with transformers.generate, and show what the time of a step is made of."""
    from cllm_core.bench.engine import BUILT_IN_PROMPTS, as_markdown, bench_engine  # noqa: PLC0415

    texts = list(BUILT_IN_PROMPTS) if prompts is None else read_prompt_file(prompts, option="--prompts")
    if output is not None:
        _make_folder(output)
    try:
        bench = bench_engine(
            model,
            texts,
            chat=chat,
            block_lengths=block_lengths or [],
            max_tokens=max_tokens,
            num_rounds=rounds,
        )
    except CllmError as error:
        exit_with(str(error))
    page = as_markdown(bench, machine=_machine(), commit=_commit())
    sys.stdout.write(page)
    if output is not None:
        record = {"machine": _machine(), "commit": _commit(), "time": datetime.now(UTC).isoformat(), "bench": bench}
        (output / "engine.json").write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
        (output / "engine.md").write_text(page)


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        exit_with(f"--output {output}: cannot be made ({error}); name another folder")


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def _commit() -> str:
    """Of the source tree, "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
