"""What the user names is found on the disk, or refused in words; no mistyped path ends at the Hub."""

import shutil
from pathlib import Path

import pytest

from cllm_core.config import EngineConfig
from cllm_core.errors import ModelLoadError
from cllm_core.models import hub, source
from cllm_core.models.cllm_json import CllmCard, write_card
from cllm_core.models.shipped import SHIPPED_FOLDER
from cllm_core.models.source import model_to_train, resolve_source
from tests.checkpoints import write_adapter


def resolve(**settings: object) -> source.ModelSource:
    return resolve_source(EngineConfig(**settings), lambda stage, fraction: None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo_id: str, **kwargs: object) -> Path:
        raise AssertionError(f"asked the Hub for {repo_id}")

    monkeypatch.setattr(source, "fetch", refuse)


@pytest.mark.parametrize(
    "name",
    ["./models/llama", "/models/llama", "~/no-such-folder", "models/llama/7b", "llama.gguf", "my model", "models/", ""],
)
def test_mistyped_path_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ModelLoadError, match="no such file or folder"):
        resolve(model=name)


def test_hub_id_is_fetched_at_its_revision(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, object]] = []

    def fetch(repo_id: str, *, revision: str | None, **kwargs: object) -> Path:
        asked.append((repo_id, revision))
        return tiny_llama

    monkeypatch.setattr(source, "fetch", fetch)
    found = resolve(model="owner/name", revision="v2")
    assert asked == [("owner/name", "v2")]
    assert (found.name, found.checkpoint.folder) == ("owner/name", tiny_llama)


def test_file_that_is_not_gguf_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"must be a \.gguf; for other formats name their folder"):
        resolve(model=str(tiny_llama / "model.safetensors"))


def test_folder_with_several_gguf_files_asks_which(tmp_path: Path) -> None:
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelLoadError, match=r"q4\.gguf, q8\.gguf\); name one"):
        resolve(model=str(tmp_path))


@pytest.mark.parametrize("relative", [True, False])
def test_adapter_alone_stands_on_the_base_it_names(tiny_llama: Path, tmp_path: Path, relative: bool) -> None:
    shutil.copytree(tiny_llama, tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", tiny_llama, base="../base" if relative else str(tmp_path / "base"))
    for settings in ({"model": str(adapter)}, {"adapter": str(adapter)}):
        found = resolve(**settings)
        assert found.checkpoint.folder.resolve() == tmp_path / "base"
        assert (found.name, found.adapter) == (str(adapter), adapter)


def test_named_model_wins_over_the_base_that_the_adapter_names(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, tiny_llama, base="owner/elsewhere")
    found = resolve(model=str(tiny_llama), adapter=str(adapter))
    assert (found.name, found.checkpoint.folder, found.adapter) == (str(tiny_llama), tiny_llama, adapter)


def test_base_that_is_the_embedded_model_is_not_fetched(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path, tiny_llama, base="HuggingFaceTB/SmolLM2-135M-Instruct")
    monkeypatch.setattr(source, "has_embedded", lambda: True)
    monkeypatch.setattr(source, "embedded_folder", lambda on_progress: tiny_llama)
    assert resolve(model=str(adapter)).checkpoint.folder == tiny_llama


def test_the_embedded_base_can_be_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "embedded_folder", lambda on_progress: tiny_llama)
    found = resolve(model="SmolLM2-135M-Instruct")
    assert (found.name, found.checkpoint.folder, found.adapter) == ("SmolLM2-135M-Instruct", tiny_llama, None)


def test_what_is_loaded_where_nothing_is_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cllm-chat; its base alone under adapters, and in training, which would start from an adapter else."""
    monkeypatch.setattr(source, "embedded_folder", lambda on_progress: tiny_llama)
    default = resolve()
    assert (default.name, default.base_name) == ("cllm-chat", "SmolLM2-135M-Instruct")
    assert default.adapter == SHIPPED_FOLDER / "cllm-chat"
    base = ("SmolLM2-135M-Instruct", None)
    for settings in ({"adapters": {"sql": "cllm-sql"}}, {"adapter_root": str(tiny_llama)}):
        found = resolve(**settings)
        assert (found.name, found.adapter) == base
    to_train = resolve(model=model_to_train(None, None))
    assert (to_train.name, to_train.adapter) == base
    assert model_to_train(None, "an/adapter") is None
    assert model_to_train("a/model", None) == "a/model"


def test_folder_named_as_adapter_that_is_none_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no adapter_config\.json"):
        resolve(model=str(tiny_llama), adapter=str(tiny_llama))


def test_two_adapters_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = str(write_adapter(tmp_path, tiny_llama))
    with pytest.raises(ModelLoadError, match="is itself an adapter"):
        resolve(model=adapter, adapter=adapter)


def test_damaged_adapter_config_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, tiny_llama)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"adapter_config\.json: cannot be read"):
        resolve(model=str(adapter))


def test_hub_ids_are_told_from_other_names() -> None:
    assert all(hub.is_hub_id(name) for name in ("gpt2", "owner/name", "owner/name-7B.v1_x"))
    assert not any(hub.is_hub_id(name) for name in ("", "a b", "a/b/c", "-a/b", "a--b", "name.git"))


@pytest.fixture
def gated(tiny_llama: Path, tmp_path: Path) -> Path:
    """A gated adapter that names its base."""
    adapter = write_adapter(tmp_path / "gated", tiny_llama, base=str(tiny_llama))
    write_card(adapter, CllmCard(format_version=1, block_length=4, domain="chat", gated=True))
    return adapter


def test_a_gated_adapter_named_as_the_model_stands_beside_its_base(tiny_llama: Path, gated: Path) -> None:
    """And its block length, which is that of its noise, is not the base's."""
    for settings in ({"model": str(gated)}, {"adapter": str(gated)}):
        found = resolve(**settings)
        assert (found.checkpoint.folder, found.adapter, found.gated_adapter) == (tiny_llama, None, gated)
        assert found.card is None


def test_no_gated_adapter_proposes_for_weights_that_another_one_changed(tiny_llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    own = write_adapter(base / "adapter", tiny_llama)
    other = write_adapter(tmp_path / "other", tiny_llama)
    assert resolve(model=str(base)).gated_adapter == own
    assert resolve(model=str(base), adapter=str(other)).gated_adapter is None
