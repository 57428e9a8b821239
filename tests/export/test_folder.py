"""An exported folder is the model that was named, for us and for plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from cllm_core.export.folder import model_card
from cllm_core.export.merged import MergedModel
from cllm_core.models.checkpoint import Checkpoint
from cllm_core.models.cllm_json import CllmCard, read_card
from cllm_core.models.embedded import EMBEDDED_NAME
from cllm_core.models.source import ModelSource
from tests.architectures import Architecture
from tests.checkpoints import ARCHITECTURES, CHATML_TEMPLATE, ENDOFTEXT_ID, IM_END_ID, build_model, build_tokenizer
from tests.conftest import CheckpointFactory
from tests.export.conftest import Export
from tests.models.conftest import Load, logits_of, plain_logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exported_folder_gives_the_same_logits(
    export: Export, tiny_checkpoint: CheckpointFactory, tmp_path: Path, architecture: Architecture
) -> None:
    source = tiny_checkpoint(architecture)
    assert torch.equal(plain_logits(export(source, tmp_path / "out")), plain_logits(source))


def test_a_merged_adapter_gives_the_logits_of_the_server(
    export: Export,
    adapter: Path,
    tmp_path: Path,
    load: Load,
) -> None:
    folder = export(adapter, tmp_path / "out")
    loaded = load(adapter)
    assert torch.equal(plain_logits(folder), logits_of(loaded.model))
    assert load(folder).tokenizer == loaded.tokenizer
    assert load(folder).eos_token_ids == loaded.eos_token_ids


def test_an_exported_folder_is_complete(export: Export, adapter: Path, tmp_path: Path) -> None:
    folder = export(adapter, tmp_path / "out")
    assert read_card(folder) == read_card(adapter)
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML_TEMPLATE
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [ENDOFTEXT_ID, IM_END_ID]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "blocks of 8 tokens" in card
    assert card.endswith("# Its own card\n\nIt was trained.\n")


def test_the_template_of_a_processor_becomes_that_of_the_tokenizer(
    export: Export, tiny_llama: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    shutil.copytree(tiny_llama, source)
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert AutoTokenizer.from_pretrained(export(source, tmp_path / "out")).chat_template == "of the processor"


def test_a_card_names_no_path_of_this_machine(export: Export, adapter: Path, tmp_path: Path) -> None:
    folder = export(adapter, tmp_path / "out")
    texts = [path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json", ".jinja")]
    assert not any(str(tmp_path) in text or "pytest" in text for text in texts)


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "BF16"), ("f16", "F16"), ("f32", "F32"), ("auto", "F32")])
def test_weights_are_stored_in_the_format_asked_for(
    export: Export, tiny_llama: Path, tmp_path: Path, dtype: str, stored: str
) -> None:
    folder = export(tiny_llama, tmp_path / "out", dtype=dtype)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118 - not a dict
    assert json.loads((folder / "config.json").read_text())["dtype"] in ("bfloat16", "float16", "float32")


def test_licences_travel_along(export: Export, tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_checkpoint("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "LICENSE").write_text("Do as you like.")
    assert (export(source, tmp_path / "out") / "LICENSE").read_text() == "Do as you like."


def test_the_embedded_model_is_named_by_its_hub_id() -> None:
    card = CllmCard(format_version=1)
    source = ModelSource("cllm-sql", Checkpoint(Path("nowhere")), EMBEDDED_NAME, adapter=Path("nowhere"), card=card)
    merged = MergedModel(source, build_model("llama"), build_tokenizer(), ())
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in model_card(merged)


def test_whoever_may_read_the_config_may_read_the_weights(export: Export, tiny_llama: Path, tmp_path: Path) -> None:
    folder = export(tiny_llama, tmp_path / "out")
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
