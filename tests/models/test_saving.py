"""What is saved has the names that transformers 4 reads beside those of release 5; tests/readers has it read them."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cllm_core.models.frequencies import same_rope
from cllm_core.models.saving import save_model, save_tokenizer, with_old_names
from tests.checkpoints import build_model, build_tokenizer
from tests.gguf_models import CONFIGS
from tests.tiny_models import tiny_config

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
        type(config).from_dict(config.to_dict())
    except Exception as error:
        pytest.skip(f"cannot be built tiny, or not read by transformers itself: {error}")
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


def test_the_sentencepiece_model_that_a_tokenizer_came_with_stays_beside_it(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.model").write_bytes(b"pieces")
    save_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"


def test_a_tokenizer_without_files_takes_none_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"of another model")
    monkeypatch.chdir(tmp_path)
    save_tokenizer(build_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()
