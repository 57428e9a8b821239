"""Compiles the C kernels into a shared library: when the package is built (setup.py) or, as a fallback, at first use.

Imports the standard library alone: where a package is built there is nothing else.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent

_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX512_BF16 = (*_AVX512, "-mavx512vnni", "-mavx512bf16")

# Instruction sets of a machine, the best first, each with the flags that kernels.c is compiled with for it.
ISA_FLAGS: dict[str, dict[str, Sequence[str]]] = {
    "x86_64": {
        "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        "avx512_bf16": _AVX512_BF16,
        "avx512": _AVX512,
        "avx2": _AVX2,
    },
    "aarch64": {"neon": ()},
}

_COMMON_SOURCES = ("dispatch.c", "team.c")
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 240
FLAGS = (
    *("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-std=gnu11", "-pthread", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"),
)


class CompilationFailed(Exception):
    """The kernels could not be compiled; the message says why."""


def machine_isas() -> dict[str, Sequence[str]]:
    """ISA_FLAGS of this machine; empty where there are no kernels for it."""
    name = platform.machine().lower()
    return ISA_FLAGS.get({"amd64": "x86_64", "arm64": "aarch64"}.get(name, name), {})


def library_name() -> str:
    """File name of the library, which changes with sources, flags and kind of machine."""
    sources = sorted((*SOURCE_FOLDER.glob("*.c"), *SOURCE_FOLDER.glob("*.h")))
    identity = [source.name.encode() + b"\0" + source.read_bytes() for source in sources]
    identity.append(repr((FLAGS, sorted(machine_isas().items()), sys.platform)).encode())
    return f"kernels-{hashlib.sha256(b'|'.join(identity)).hexdigest()[:16]}.so"


def find_compiler() -> list[str] | None:
    """The command of the C compiler: $CC, or the first there is of cc, gcc and clang; None where there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    return next(([found] for name in _COMPILERS if (found := shutil.which(name))), None)


def compile_library(folder: Path) -> Path:
    """Compile the library into a folder, which is made; other processes see it as a whole or not at all.

    An instruction set that the compiler is too old for is left out, with a log.

    Raises:
        CompilationFailed: nothing that works came of it.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CompilationFailed(f"there is no C compiler ({', '.join(_COMPILERS)})")
    if not machine_isas():
        raise CompilationFailed(f"they are not written for machines of type {platform.machine()}")
    library = folder / library_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = _build(compiler, Path(work))
            built.replace(library)
    except OSError as error:
        raise CompilationFailed(str(error)) from error
    logger.info("compiled the C kernels with %s", compiler[0])
    return library


def _build(compiler: list[str], work: Path) -> Path:
    """Objects of all instruction sets, compiled at the same time, and the library of them."""
    commands: dict[str, tuple[Path, Sequence[str]]] = {name: (SOURCE_FOLDER / name, ()) for name in _COMMON_SOURCES}
    for isa, flags in machine_isas().items():
        commands[isa] = (SOURCE_FOLDER / "kernels.c", (f"-DISA={isa}", *flags))
    running = {
        name: _start([*compiler, *FLAGS, *flags, "-c", str(source), "-o", str(work / f"{name}.o")])
        for name, (source, flags) in commands.items()
    }
    errors = {name: _error_of(process) for name, process in running.items()}
    compiled = [name for name, error in errors.items() if error is None]
    for name in _COMMON_SOURCES:
        if errors[name] is not None:
            raise CompilationFailed(f"{name}: {errors[name]}")
    if set(compiled) == set(_COMMON_SOURCES):
        raise CompilationFailed(next(str(error) for error in errors.values() if error is not None))
    for name, error in errors.items():
        if error is not None:
            logger.warning("%s cannot compile the C kernels for %s, which are left out: %s", compiler[0], name, error)
    built = work / "kernels.so"
    objects = [str(work / f"{name}.o") for name in compiled]
    error = _error_of(_start([*compiler, "-shared", "-pthread", "-o", str(built), *objects]))
    if error is not None:
        raise CompilationFailed(error)
    return built


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")


def _error_of(process: subprocess.Popen[str]) -> str | None:
    """Why a compiler failed; None where it did not."""
    try:
        _, output = process.communicate(timeout=_COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"it took more than {_COMPILE_SECONDS} s"
    return None if process.returncode == 0 else output[-500:] or f"exit status {process.returncode}"
