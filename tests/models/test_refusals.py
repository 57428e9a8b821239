"""What cannot be served is refused with a message that names the cause and a remedy, never with random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    ChameleonConfig,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    T5Config,
)

from cllm_core.config import EngineConfig
from cllm_core.errors import ModelLoadError
from cllm_core.models.loader import load_model
from tests.models.conftest import Load


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "t5 is an encoder-decoder"),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM is not a causal language model"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "not a causal language model"),
        (MambaConfig(architectures=["MambaForCausalLM"]), "MambaForCausalLM keeps other state"),
        (Qwen3NextConfig(architectures=["Qwen3NextForCausalLM"]), "linear_attention.* cannot be paged"),
        (GPTJConfig(architectures=["GPTJForCausalLM"]), "GPTJForCausalLM computes attention in its own code"),
        (ChameleonConfig(architectures=["ChameleonForConditionalGeneration"]), "not a causal language model"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_architecture_that_cannot_run_is_named(config: PreTrainedConfig, reason: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=reason):
        load_model(EngineConfig(model=str(tmp_path), device="cpu"), lambda stage, fraction: None)


def test_unknown_architecture_is_named(load: Load, copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(ModelLoadError, match="no-such-type"):
        load(copy)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("config.json", "has no config.json; name a folder"),
        ("model.safetensors", "cannot read the weights"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_missing_file_is_named(load: Load, copy: Path, file: str, reason: str) -> None:
    (copy / file).unlink()
    if file == "tokenizer.json":
        (copy / "tokenizer_config.json").unlink()
    with pytest.raises(ModelLoadError, match=reason):
        load(copy)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_damaged_file_is_a_load_error(load: Load, copy: Path, file: str) -> None:
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match=str(copy)):
        load(copy)


def test_bin_file_that_carries_code_is_not_run(load: Load, copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"weight": _Payload(tmp_path / "ran")}, copy / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="cannot read the weights"):
        load(copy)
    assert not (tmp_path / "ran").exists()


def test_missing_weight_is_an_error_not_a_random_one(load: Load, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"weights are missing.*layers\.1\.mlp\.up_proj"):
        load(copy)


def test_weight_without_a_place_is_an_error(load: Load, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"no place for.*q_proj\.bias"):
        load(copy)


def test_weight_of_another_shape_is_an_error(load: Load, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelLoadError, match=r"another shape.*down_proj\.weight .*\[64, 128\].*\[64, 96\]"):
        load(copy)


def test_cuda_without_a_cuda_device_says_so(load: Load, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelLoadError, match=r'device="cuda".*device="cpu"'):
        load(tiny_llama, device="cuda")


class _Payload:
    """Unpickling one creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)
