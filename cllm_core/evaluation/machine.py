"""Where and with what the numbers were measured."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil
import torch

from cllm_core import __version__

_CPU_INFO = Path("/proc/cpuinfo")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Hardware and versions.

    Attributes:
        cores: that this process may use; `threads` are torch's.
        commit: of the checkout this code runs from, with "+changes" where files differ from it; None outside of one.
        date: UTC, ISO 8601.
    """

    cpu: str
    cores: int
    threads: int
    memory_gib: float
    gpu: str | None
    python: str
    torch: str
    version: str
    commit: str | None
    date: str


def describe_machine() -> Machine:
    """This machine, now."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(psutil.Process().cpu_affinity() or []) if hasattr(psutil.Process, "cpu_affinity") else _cpu_count(),
        threads=torch.get_num_threads(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        torch=str(torch.__version__),
        version=__version__,
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _cpu_count() -> int:
    return psutil.cpu_count() or 1


def _cpu_model() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*words: str) -> str | None:
    """Output of a git command in the folder of this file; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
