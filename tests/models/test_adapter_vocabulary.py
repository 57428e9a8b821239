"""An adapter with tokens of its own makes its base grow; the result is what PEFT computes on a base resized by hand."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm_core.errors import ModelLoadError
from cllm_core.models.loader import LoadedModel
from tests.checkpoints import IM_END_ID, VOCAB_SIZE, build_model, build_tokenizer, draw_weights
from tests.models.conftest import Load, logits_of

NUM_ADDED = 3
ADDED_IDS = list(range(VOCAB_SIZE, VOCAB_SIZE + NUM_ADDED))


def write_base(folder: Path, *, is_tied: bool) -> Path:
    model = build_model("llama")
    if is_tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def write_grown_adapter(folder: Path, base: Path, **lora: Any) -> torch.Tensor:
    """Write an adapter with three more tokens, the first of them its end token; returns PEFT's logits."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|ours|>", "<|yours|>"], "eos_token": "<|done|>"})
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **lora}
    torch.manual_seed(2)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    trained = torch.nn.ParameterDict(
        {name.replace(".", "/"): weight for name, weight in tuned.named_parameters() if weight.requires_grad}
    )
    draw_weights(trained, seed=3)
    tuned.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    tuned.eval()
    return logits_of(tuned)


def assert_equal(loaded: LoadedModel, expected: torch.Tensor) -> None:
    found = logits_of(loaded.model)
    assert found.shape[-1] == VOCAB_SIZE + NUM_ADDED
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore")  # PEFT and transformers comment on resized embeddings
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": ADDED_IDS}},
    ],
    ids=["saved along", "modules_to_save", "trainable_token_indices"],
)
def test_the_base_grows_to_the_adapters_vocabulary(
    load: Load, tmp_path: Path, lora: dict[str, Any], is_tied: bool
) -> None:
    """It was said to be trained on another base."""
    base = write_base(tmp_path / "base", is_tied=is_tied)
    expected = write_grown_adapter(tmp_path / "adapter", base, **lora)
    loaded = load(tmp_path / "adapter")
    assert_equal(loaded, expected)
    assert set(loaded.eos_token_ids) & set(ADDED_IDS)
    assert IM_END_ID in loaded.eos_token_ids


@pytest.mark.filterwarnings("ignore")
def test_added_tokens_without_their_rows_are_refused(load: Load, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", is_tied=False)
    write_grown_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ModelLoadError, match="does not hold their rows of lm_head; save it with"):
        load(tmp_path / "adapter")
