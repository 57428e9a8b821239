"""What a build of the package contains."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cllm_core.backends.cpu.compilation import find_compiler, library_name, machine_isas

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "cllm_core", "server")


def build_wheel(folder: Path) -> zipfile.ZipFile:
    """A wheel of the sources here, without the checkpoints."""
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "*.safetensors", "__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.mark.slow
def test_a_wheel_brings_the_kernels_compiled(tmp_path: Path) -> None:
    if find_compiler() is None or not machine_isas():
        pytest.skip("there are no C kernels for this machine, or no C compiler")
    wheel = build_wheel(tmp_path)
    libraries = [name for name in wheel.namelist() if name.endswith(".so")]
    assert libraries == [f"cllm_core/backends/cpu/{library_name()}"]
    assert "-py3-none-" in str(wheel.filename)
    assert "-none-any" not in str(wheel.filename)
    assert {"cllm_server/openai/chat/route.py", "cllm_server/py.typed"} <= set(wheel.namelist())
    assert {name.split("/")[0] for name in wheel.namelist() if ".dist-info" not in name} == {"cllm_core", "cllm_server"}


@pytest.mark.slow
def test_a_wheel_built_without_a_compiler_is_for_any_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    wheel = build_wheel(tmp_path)
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    assert "cllm_core/backends/cpu/kernels.c" in wheel.namelist()
    assert str(wheel.filename).endswith("-py3-none-any.whl")
