"""The kernels against float64 in C (check_kernels.c), where Python cannot look: on an emulated processor, and with the
checks that compilers have for memory and threads.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from cllm_core.backends.cpu.compilation import FLAGS, ISA_FLAGS, SOURCE_FOLDER, find_compiler, machine_isas

CHECK = Path(__file__).with_name("check_kernels.c")
SOURCES = [str(CHECK), *(str(SOURCE_FOLDER / name) for name in ("dispatch.c", "team.c"))]
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
NO_SUCH_PROCESSOR = 77

pytestmark = pytest.mark.slow


def build(compiler: Sequence[str], flags: Sequence[str], folder: Path) -> str:
    program = folder / "check"
    command = [*compiler, *FLAGS, *flags, f"-I{SOURCE_FOLDER}", *SOURCES, "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    return str(program)


def check(command: Sequence[str], **environment: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if ended.returncode == NO_SUCH_PROCESSOR:
        pytest.skip(ended.stdout.strip())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 of" in ended.stdout


@pytest.mark.parametrize("processor", ["max", "cortex-a53"])  # with and without dot products
def test_neon_on_an_emulated_processor(processor: str, tmp_path: Path) -> None:
    if not shutil.which(CROSS_COMPILER) or not shutil.which(EMULATOR):
        pytest.skip(f"{CROSS_COMPILER} or {EMULATOR} is missing (Debian: gcc-aarch64-linux-gnu and qemu-user)")
    program = build([CROSS_COMPILER], ["-static", "-DISA=neon", *ISA_FLAGS["aarch64"]["neon"]], tmp_path)
    check([EMULATOR, "-cpu", processor, program])


@pytest.mark.parametrize("isa", machine_isas())
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_nothing_is_read_or_written_that_should_not_be(isa: str, sanitizers: str, tmp_path: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler here")
    watching = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    program = build(compiler, [*watching, f"-DISA={isa}", *machine_isas()[isa]], tmp_path)
    check([program], ASAN_OPTIONS="detect_leaks=0")
