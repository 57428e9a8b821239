"""A merged adapter is the base plus B A, added in float32 and rounded once; one that does not fit is refused."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cllm_core.errors import ModelLoadError
from cllm_core.models.cllm_json import CllmCard, write_card
from tests.architectures import Architecture
from tests.checkpoints import write_adapter
from tests.conftest import CheckpointFactory
from tests.models.conftest import Load, logits_of, plain_logits

_LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def test_merged_weight_is_base_plus_scaled_product(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, tiny_llama)
    lora = load_file(adapter / "adapter_model.safetensors")
    base = load_file(tiny_llama / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    merged = load(tiny_llama, adapter=str(adapter)).model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    scale = 8 / 4  # lora_alpha / r of write_adapter
    torch.testing.assert_close(merged, base + scale * lora[_LORA.format("B")] @ lora[_LORA.format("A")])


def test_merged_model_computes_what_the_unmerged_one_does(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, tiny_llama, use_rslora=True)
    unmerged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter)
    merged = logits_of(load(adapter).model)
    assert not torch.allclose(merged, plain_logits(tiny_llama), atol=0.1)
    torch.testing.assert_close(merged, logits_of(unmerged), atol=1e-4, rtol=1e-4)


def test_merge_rounds_only_once(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    """Rotary frequencies are buffers in float32; casting the whole model would round them too."""
    adapter = write_adapter(tmp_path / "adapter", tiny_llama)
    load(adapter).model.save_pretrained(tmp_path / "merged")
    loaded = load(adapter, dtype="bfloat16")
    assert torch.equal(logits_of(loaded.model), plain_logits(tmp_path / "merged", torch.bfloat16))


def test_cllm_json_of_the_adapter_wins(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    adapter = write_adapter(tmp_path / "adapter", base)
    write_card(base, CllmCard(format_version=1, block_length=4, domain="chat"))
    assert (load(adapter).block_length, load(adapter).domain) == (4, "chat")
    write_card(adapter, CllmCard(format_version=1, block_length=32, domain="sql"))
    assert (load(adapter).block_length, load(adapter).domain) == (32, "sql")


def test_tokenizer_of_the_adapter_wins(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, tiny_llama)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load(adapter).tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("other", ["qwen2-sliding", "wider"])
def test_adapter_of_another_base_is_refused(
    load: Load, tiny_checkpoint: CheckpointFactory, tiny_llama: Path, tmp_path: Path, other: str
) -> None:
    """One names layers that the base lacks, the other has weights of another shape."""
    if other == "wider":
        adapter = write_adapter(tmp_path, tiny_llama)
        path = adapter / "adapter_model.safetensors"
        save_file({name: weight.repeat(1, 2) for name, weight in load_file(path).items()}, path, {"format": "pt"})
    else:
        adapter = write_adapter(tmp_path, tiny_checkpoint("qwen2-sliding"))
    with pytest.raises(ModelLoadError, match=r"does not fit.*trained on another base"):
        load(tiny_llama, adapter=str(adapter))


def test_adapter_with_a_missing_weight_is_refused(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, tiny_llama) / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[_LORA.format("B")]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"no counterpart: .*q_proj\.lora_B"):
        load(tiny_llama, adapter=str(tmp_path))


def test_adapter_without_its_weights_is_refused(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    (write_adapter(tmp_path, tiny_llama) / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"has no adapter_model\.safetensors or adapter_model\.bin"):
        load(tiny_llama, adapter=str(tmp_path))


def test_adapter_that_cannot_be_merged_is_refused(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(str(tmp_path))
    with pytest.raises(ModelLoadError, match="PROMPT_TUNING adapter adds to the prompt and cannot be merged"):
        load(tiny_llama, adapter=str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_adapter_of_a_tied_embedding_is_refused(load: Load, tiny_llama: Path, tmp_path: Path) -> None:
    """Merging it would change the output head along with the input embedding."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens"])
    with pytest.raises(ModelLoadError, match="embed_tokens, which the base ties to another layer"):
        load(adapter)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_replicated_layers_get_their_own_change_once(
    load: Load, tiny_checkpoint: CheckpointFactory, tmp_path: Path, architecture: Architecture
) -> None:
    """PEFT lets copies of a layer share their weights, and a merge changed these once for each copy."""
    base = tiny_checkpoint(architecture)
    adapter = write_adapter(tmp_path, base, layer_replication=[(0, 2), (1, 2)])
    model = AutoModelForCausalLM.from_pretrained(base)
    unmerged = peft.PeftModel.from_pretrained(model, adapter)
    if architecture == "qwen3":  # which PEFT leaves at two
        model.config.layer_types = ["full_attention"] * 3
    loaded = load(adapter)
    assert loaded.model.config.num_hidden_layers == 3
    torch.testing.assert_close(logits_of(loaded.model), logits_of(unmerged), atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore")  # PEFT takes biases for broken matrices, and says what it will refuse
def test_biases_of_an_adapter_are_merged_where_the_base_has_some(
    load: Load, tiny_checkpoint: CheckpointFactory, tiny_llama: Path, tmp_path: Path
) -> None:
    qwen2, targets = tiny_checkpoint("qwen2"), ["q_proj", "v_proj"]
    adapter = write_adapter(tmp_path / "qwen2", qwen2, lora_bias=True, target_modules=targets)
    unmerged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen2), adapter)
    torch.testing.assert_close(logits_of(load(adapter).model), logits_of(unmerged), atol=1e-3, rtol=0)
    with pytest.raises(ModelLoadError, match=r"cannot be merged into .*: Impossible to merge .*lora_bias"):
        load(write_adapter(tmp_path / "llama", tiny_llama, lora_bias=True, target_modules=targets))
