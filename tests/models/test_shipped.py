"""Built-in adapters are found by name in the package, and a wrong name is answered with those there are."""

import shutil
from pathlib import Path

import pytest

from cllm_core.config import EngineConfig
from cllm_core.errors import ModelLoadError
from cllm_core.models import shipped, source
from cllm_core.models.shipped import shipped_adapter, shipped_names
from cllm_core.models.source import locate_adapter, locate_adapter_below, resolve_source
from tests.checkpoints import write_adapter


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the adapters cllm-sql and cllm-chat of the embedded model, for which the tiny one stands in."""
    monkeypatch.setattr(shipped, "SHIPPED_FOLDER", tmp_path)
    monkeypatch.setattr(source, "embedded_folder", lambda on_progress: tiny_llama)
    monkeypatch.setattr(source, "has_embedded", lambda: True)
    for name in ("cllm-sql", "cllm-chat"):
        write_adapter(tmp_path / name, tiny_llama, base="HuggingFaceTB/SmolLM2-135M-Instruct")
    return tmp_path


def ignore_progress(stage: str, fraction: float) -> None:
    pass


def test_a_built_in_name_is_an_adapter_on_the_embedded_base(folder: Path, tiny_llama: Path) -> None:
    found = resolve_source(EngineConfig(model="cllm-sql"), ignore_progress)
    assert (found.name, found.adapter, found.checkpoint.folder) == ("cllm-sql", folder / "cllm-sql", tiny_llama)


def test_a_built_in_name_works_where_an_adapter_is_named(folder: Path) -> None:
    assert locate_adapter("cllm-sql", EngineConfig(), ignore_progress) == folder / "cllm-sql"
    assert locate_adapter_below("/anywhere", "cllm-chat") == folder / "cllm-chat"


def test_a_wrong_built_in_name_is_answered_with_those_there_are(folder: Path) -> None:
    with pytest.raises(
        ModelLoadError, match="cllm-sq1: no built-in adapter of this name; there are cllm-chat, cllm-sql"
    ):
        resolve_source(EngineConfig(model="cllm-sq1"), ignore_progress)
    shutil.rmtree(folder / "cllm-sql")
    shutil.rmtree(folder / "cllm-chat")
    with pytest.raises(ModelLoadError, match="this build brings none"):
        shipped_adapter("cllm-sql")


def test_a_folder_of_that_name_wins(folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = folder / "work"
    write_adapter(work / "cllm-sql", tiny_llama)
    monkeypatch.chdir(work)
    found = resolve_source(EngineConfig(model="cllm-sql"), ignore_progress)
    assert found.adapter is not None
    assert found.adapter.resolve() == work / "cllm-sql"


def test_names_with_an_owner_are_left_to_the_hub() -> None:
    assert shipped_adapter("cllm/consistency-llm-7b-spider") is None


def test_every_shipped_adapter_is_whole() -> None:
    for name in shipped_names():
        files = {path.name for path in (shipped.SHIPPED_FOLDER / name).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "cllm.json", "README.md"} <= files
