"""A LoRA adapter is read as PEFT would apply it; what cannot be served beside the base is refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cllm_core.errors import ModelLoadError
from cllm_core.models.lora import LinearShape, LowRank, read_lora
from tests.checkpoints import write_adapter
from tests.conftest import CheckpointFactory

WEIGHTS = "adapter_model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj"


def linears_of(base: Path) -> dict[str, LinearShape]:
    model = AutoModelForCausalLM.from_pretrained(base)
    inner = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name: LinearShape(m.in_features, m.out_features) for name, m in inner if name != "lm_head"}


def read(folder: Path, base: Path) -> dict[str, LowRank]:
    return read_lora(folder, linears_of(base), base_name="tiny")


def change_settings(folder: Path, settings: Mapping[str, object]) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "r": 6},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 40}},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0]},
        {"target_modules": r".*(q|down)_proj"},
    ],
    ids=["plain", "rslora", "patterns", "one layer", "expression"],
)
def test_products_are_what_peft_adds_to_the_weights(tiny_llama: Path, tmp_path: Path, lora: dict[str, object]) -> None:
    folder = write_adapter(tmp_path, tiny_llama, base=None, seed=1, **lora)
    before = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder)
    after = tuned.merge_and_unload().state_dict()
    layers = read(folder, tiny_llama)
    assert QUERY in layers
    for name, weight in after.items():
        pair = layers.get(name.removesuffix(".weight"))
        added = torch.zeros_like(weight) if pair is None else pair.up @ pair.down
        torch.testing.assert_close(weight - before[name], added, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "layers trained as a whole"),
        ({"trainable_token_indices": [1, 2]}, "trained embeddings"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"init_lora_weights": "pissa"}, "weights that start from a changed base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "replicated layers"),
    ],
)
def test_what_only_merging_can_serve_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    change_settings(write_adapter(tmp_path, tiny_llama), settings)
    with pytest.raises(ModelLoadError, match=rf"has {named}.*; merge it where it was trained"):
        read(tmp_path, tiny_llama)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_adapters_of_head_and_embedding_are_refused(tiny_llama: Path, tmp_path: Path, target: str) -> None:
    write_adapter(tmp_path, tiny_llama, target_modules=[target])
    with pytest.raises(ModelLoadError, match=target):
        read(tmp_path, tiny_llama)


def test_an_adapter_of_another_base_is_refused(
    tiny_llama: Path, tiny_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    deeper = write_adapter(tmp_path / "deeper", tiny_checkpoint("qwen2-sliding"), base="owner/deeper")
    with pytest.raises(ModelLoadError, match=r"does not fit tiny; was it trained on another base \(owner/deeper\)\?"):
        read(deeper, tiny_llama)
    wider = write_adapter(tmp_path / "wider", tiny_llama) / WEIGHTS
    save_file({name: weight.repeat(1, 2) for name, weight in load_file(wider).items()}, wider, {"format": "pt"})
    with pytest.raises(ModelLoadError, match="does not fit tiny"):
        read(wider.parent, tiny_llama)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [(f"{QUERY}.lora_B", "half of the weights of model.layers.0.self_attn.q_proj"), (QUERY, "its weights lack it")],
)
def test_an_adapter_that_lacks_weights_is_refused(tiny_llama: Path, tmp_path: Path, lacking: str, message: str) -> None:
    path = write_adapter(tmp_path, tiny_llama) / WEIGHTS
    save_file({name: weight for name, weight in load_file(path).items() if lacking not in name}, path)
    with pytest.raises(ModelLoadError, match=message):
        read(tmp_path, tiny_llama)


def test_damaged_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (write_adapter(tmp_path, tiny_llama) / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(ModelLoadError, match="its weights cannot be read"):
        read(tmp_path, tiny_llama)


def test_other_kinds_of_adapters_are_refused_by_their_kind(tiny_llama: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(str(tmp_path))
    with pytest.raises(ModelLoadError, match="is a PROMPT_TUNING adapter; only LoRA adapters"):
        read(tmp_path, tiny_llama)
