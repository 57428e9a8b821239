"""Where the library of the kernels comes from, and what is said where there is none."""

import logging
import shutil
import stat
from pathlib import Path

import pytest

from cllm_core.backends.cpu import compilation, library
from cllm_core.backends.cpu.compilation import CompilationFailed, compile_library, library_name, machine_isas
from cllm_core.backends.cpu.library import KernelLibrary, load_kernels, load_library
from cllm_core.config import CpuIsaName
from cllm_core.errors import ConfigError


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compilation.find_compiler() is None or not machine_isas():
        pytest.skip("there are no C kernels for this machine, or no C compiler")
    return compile_library(tmp_path_factory.mktemp("package"))


@pytest.fixture
def _no_package_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "SOURCE_FOLDER", tmp_path / "no package")


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)


def fake_compiler(folder: Path, script: str) -> Path:
    """A compiler that runs a line of shell before the real one."""
    real = compilation.find_compiler()
    assert real is not None
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\n{script}\nexec {" ".join(real)} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.usefixtures("_no_compiler")
def test_the_library_that_comes_with_the_package_needs_no_compiler(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "SOURCE_FOLDER", compiled.parent)
    assert load_library(tmp_path) is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_no_package_library", "_no_compiler")
def test_a_library_in_the_cache_is_not_compiled_again(compiled: Path) -> None:
    assert load_library(compiled.parent) is not None


def test_changed_sources_and_flags_take_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [library_name()]
    folder = tmp_path / "sources"
    shutil.copytree(compilation.SOURCE_FOLDER, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(compilation, "SOURCE_FOLDER", folder)
    assert library_name() == names[0]
    (folder / "vector.h").write_text((folder / "vector.h").read_text() + "\n")
    names.append(library_name())
    monkeypatch.setattr(compilation, "FLAGS", (*compilation.FLAGS, "-g"))
    names.append(library_name())
    assert len(set(names)) == 3


@pytest.mark.usefixtures("_no_package_library", "_no_compiler")
def test_without_library_and_compiler_one_warning_names_cost_and_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernels-0000000000000000.so").touch()  # of other sources
    assert load_kernels(tmp_path) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no C compiler" in record.message
    assert "several times as long" in record.message
    assert "Install a C compiler" in record.message


@pytest.mark.usefixtures("_no_package_library")
def test_a_compiler_that_fails_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", str(fake_compiler(tmp_path, "echo no space left >&2; exit 1")))
    assert load_kernels(tmp_path / "cache") is None
    assert "no space left" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = next(iter(machine_isas()))
    script = f'case "$*" in *-DISA={best}*) echo unknown flag >&2; exit 1;; esac'
    monkeypatch.setenv("CC", str(fake_compiler(tmp_path, script)))
    if len(machine_isas()) == 1:
        with pytest.raises(CompilationFailed, match="unknown flag"):
            compile_library(tmp_path)
        return
    found = KernelLibrary(compile_library(tmp_path)).isas
    assert found == tuple(isa for isa in KernelLibrary(compiled).isas if isa != best)
    assert f"for {best}, which are left out: unknown flag" in caplog.text


@pytest.mark.usefixtures("_no_package_library")
def test_a_library_of_another_machine_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / library_name()).write_bytes(b"no library")
    assert library._built(tmp_path) is None
    assert "cannot be loaded" in caplog.text


def test_an_instruction_set_that_the_processor_lacks_is_refused_with_those_it_has(compiled: Path) -> None:
    loaded = KernelLibrary(compiled)
    lacking: CpuIsaName = "neon" if "avx2" in loaded.isas else "avx2"
    with pytest.raises(ConfigError, match=f"cpu_isa='{lacking}': the C kernels can use {', '.join(loaded.isas)} on"):
        loaded.kernels(lacking)
