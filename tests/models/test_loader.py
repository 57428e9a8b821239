"""Every way to name a checkpoint yields exactly the model that plain transformers reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from cllm_core.config import EngineConfig
from cllm_core.models.cllm_json import CllmCard, write_card
from cllm_core.models.loader import load_model
from tests.architectures import Architecture
from tests.checkpoints import (
    ARCHITECTURES,
    ENDOFTEXT_ID,
    IM_END_ID,
    MAX_POSITIONS,
    VOCAB_SIZE,
    write_adapter,
    write_gguf,
)
from tests.conftest import CheckpointFactory
from tests.models.conftest import Load, logits_of, plain_logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folder_gives_the_logits_of_transformers(
    load: Load, tiny_checkpoint: CheckpointFactory, architecture: Architecture
) -> None:
    folder = tiny_checkpoint(architecture)
    loaded = load(folder)
    assert torch.equal(logits_of(loaded.model), plain_logits(folder))


def test_sharded_safetensors_give_the_same_logits(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(load(tmp_path).model), plain_logits(tiny_llama))


def test_legacy_bin_gives_the_same_logits(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(logits_of(load(tmp_path).model), plain_logits(tiny_llama))


@pytest.mark.parametrize("named", ["file", "folder"])
def test_gguf_gives_the_same_logits_and_tokenizer(load: Load, tiny_llama: Path, tmp_path: Path, named: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    loaded = load(path if named == "file" else tmp_path, dtype="float32")
    original = load(tiny_llama)
    assert torch.equal(logits_of(loaded.model), plain_logits(tiny_llama))
    assert loaded.tokenizer.chat_template == original.tokenizer.chat_template
    assert loaded.tokenizer.special_tokens["eos_token"] == original.tokenizer.special_tokens["eos_token"]
    assert loaded.eos_token_ids == original.eos_token_ids == (ENDOFTEXT_ID, IM_END_ID)
    assert loaded.max_model_len == MAX_POSITIONS


def test_loaded_model_describes_itself(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    write_card(tmp_path, CllmCard(format_version=1, block_length=8, domain="sql"))
    loaded = load(tmp_path)
    assert (loaded.name, loaded.block_length, loaded.domain) == (str(tmp_path), 8, "sql")
    assert loaded.max_model_len == MAX_POSITIONS
    assert loaded.dtype is torch.float32
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_end_of_sequence_tokens_come_from_all_three_places(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ENDOFTEXT_ID, 7]}))
    assert load(tmp_path).eos_token_ids == (ENDOFTEXT_ID, IM_END_ID, 7, 9)


@pytest.mark.parametrize("value", [-1, 2.0, True, "</s>", [[7]], {"id": 7}, VOCAB_SIZE, [-1, None]], ids=repr)
def test_an_end_token_that_is_no_id_is_left_out_with_a_warning(
    load: Load, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, value: object
) -> None:
    """-1 made every grammar fail; a text or a nested list was a traceback."""
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert load(tmp_path).eos_token_ids == (IM_END_ID,)
    wrong = value[0] if isinstance(value, list) else value
    assert f"generation_config.json names {wrong!r}" in caplog.text


def test_an_end_token_of_the_config_that_no_vocabulary_has_is_left_out(
    load: Load, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [9, -1]}))
    assert load(tmp_path).eos_token_ids == (ENDOFTEXT_ID, IM_END_ID, 9)
    assert "config.json names -1 as end of sequence" in caplog.text


def test_requested_dtype_is_that_of_every_weight(load: Load, tiny_llama: Path) -> None:
    loaded = load(tiny_llama, dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(loaded.model), plain_logits(tiny_llama, torch.bfloat16))


def test_progress_rises_to_one_and_nothing_is_drawn(tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, float]] = []
    config = EngineConfig(model=str(tiny_llama), device="cpu")
    load_model(config, lambda stage, fraction: seen.append((stage, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert "reading weights" in dict(seen)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_the_checkpoint_runs_only_where_trusted(
    load: Load, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "own"))
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    config |= {"architectures": ["OwnForCausalLM"]} if trusted else {}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(folder, trust_remote_code=trusted)
    assert type(loaded.model).__name__ == ("OwnForCausalLM" if trusted else "LlamaForCausalLM")
    assert torch.equal(logits_of(loaded.model), plain_logits(tiny_llama))


@pytest.mark.gpu
def test_model_is_read_to_the_gpu(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, tiny_llama)
    for loaded in (load(tiny_llama, device="auto"), load(adapter, device="cuda")):
        assert loaded.device.type == "cuda"
        assert {parameter.device for parameter in loaded.model.parameters()} == {loaded.device}
        assert {buffer.device for buffer in loaded.model.buffers()} == {loaded.device}
