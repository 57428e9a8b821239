"""What is saved reads alike in transformers 5 and 4.

The slow tests need a Python with transformers 4, whose path is in the environment variable TRANSFORMERS_4.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cllm_core.models.frequencies import same_rope
from cllm_core.models.saving import save_model, save_tokenizer, with_old_names
from tests.checkpoints import build_model, build_tokenizer
from tests.export.conftest import Export, export  # noqa: F401 - a fixture here, too
from tests.gguf_models import CONFIGS, write_model
from tests.tiny_models import tiny_config

SCRIPT = Path(__file__).parent / "load_with_transformers_4.py"
PYTHON = os.environ.get("TRANSFORMERS_4")
TEXT = "<|im_start|>user\nThe server reads 42 naïve tokens.<|im_end|>"


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("llama-2", {"rope_theta": 10000.0}),
        ("llama-linear", {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("gemma-3", {"rope_local_base_freq": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("phi-4-mini", {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 256}),
    ],
)
def test_a_saved_config_has_the_names_of_both_releases(tmp_path: Path, name: str, added: dict[str, object]) -> None:
    saved = json.loads((write_saved(tmp_path, name) / "config.json").read_text())
    assert saved["rope_parameters"] == CONFIGS[name].rope_parameters
    assert added.items() <= saved.items()
    assert same_rope(AutoConfig.from_pretrained(tmp_path), CONFIGS[name])


def write_saved(folder: Path, name: str) -> Path:
    model = build_model("llama")
    model.config = CONFIGS[name]
    save_model(model, folder)
    return folder


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_the_old_names_change_nothing_for_transformers_5(model_type: str) -> None:
    try:
        config = tiny_config(model_type)
    except Exception as error:
        pytest.skip(f"cannot be built tiny: {error}")
    restored = type(config).from_dict(with_old_names(config, config.to_dict()))
    assert getattr(restored, "rope_parameters", None) == getattr(config, "rope_parameters", None)


def test_a_saved_tokenizer_names_a_class_of_both_releases(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    save_tokenizer(tokenizer, tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["additional_special_tokens"] == ["<|tool|>"]
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & saved.keys()
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read(TEXT + "<|tool|>") == tokenizer(TEXT + "<|tool|>")
    assert read.special_tokens_map == tokenizer.special_tokens_map
    assert read.extra_special_tokens == tokenizer.extra_special_tokens
    assert read.chat_template == tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="TRANSFORMERS_4 names no Python that has transformers 4")
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_4_computes_the_same_from_an_export(
    export: Export,  # noqa: F811 - the fixture
    tmp_path: Path,
    name: str,
) -> None:
    folder = export(write_model(tmp_path / "source", name), tmp_path / "folder")
    answer = subprocess.run([str(PYTHON), SCRIPT, folder, TEXT], capture_output=True, text=True, check=True)
    theirs = json.loads(answer.stdout)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert theirs["release"].startswith("4.")
    assert theirs["ids"] == tokenizer(TEXT)["input_ids"]
    assert theirs["special_tokens"] == tokenizer.special_tokens_map
    assert theirs["chat_template"] == tokenizer.chat_template
    with torch.no_grad():
        ours = model(torch.tensor([theirs["prompt"]])).logits[0, -1]
    assert torch.allclose(torch.tensor(theirs["logits"]), ours, atol=1e-4)
