"""A GGUF file is the model that was named, read back by transformers, which undoes llama.cpp's layout."""

from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cllm_core.errors import ConfigError, ModelLoadError
from cllm_core.models.cllm_json import read_card
from cllm_core.models.gguf.architectures import interleave_rotary
from tests.architectures import Architecture
from tests.checkpoints import CHATML_TEMPLATE, IM_END_ID, build_model, build_tokenizer
from tests.conftest import CheckpointFactory
from tests.export.conftest import Export
from tests.models.conftest import Load, logits_of, plain_logits

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def field(path: Path, name: str) -> object:
    """The value of a metadata field."""
    found = gguf.GGUFReader(path).get_field(name)
    return None if found is None else found.contents()


def read_back(path: Path) -> torch.Tensor:
    """Logits that transformers computes from the file in float32."""
    options = {"gguf_file": path.name, "dtype": torch.float32, "attn_implementation": "eager"}
    return logits_of(AutoModelForCausalLM.from_pretrained(path.parent, **options))


def write_variant(folder: Path, splitter: pre_tokenizers.PreTokenizer, **model: object) -> Path:
    """The tiny Llama with a tokenizer that splits texts this way."""
    tokenizer = build_tokenizer()
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = splitter
    for name, value in model.items():
        setattr(backend.model, name, value)
    build_model("llama").save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_a_file_read_back_gives_the_logits_of_the_folder(
    export: Export, tiny_llama: Path, tmp_path: Path, dtype: str
) -> None:
    path = export(tiny_llama, tmp_path / "tiny.gguf", format="gguf", dtype=dtype)
    assert torch.equal(read_back(path), plain_logits(export(tiny_llama, tmp_path / "folder", dtype=dtype)))


def test_a_merged_adapter_read_back_gives_the_logits_of_the_server(
    export: Export,
    adapter: Path,
    tmp_path: Path,
    load: Load,
) -> None:
    path = export(adapter, tmp_path / "files" / "tiny.gguf", format="gguf")
    assert torch.equal(read_back(path), logits_of(load(adapter).model))
    assert read_card(path.parent) == read_card(adapter)
    assert (load(path, dtype="float32").block_length, load(path, dtype="float32").domain) == (8, "sql")


def test_a_file_does_not_get_the_block_length_of_another_model(
    export: Export, adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """The cllm.json of the first file was silently that of the second, too."""
    first = export(adapter, tmp_path / "files" / "first.gguf", format="gguf")
    with pytest.raises(ConfigError, match=r"cllm.json belongs to another model"):
        export(tiny_llama, first.with_name("second.gguf"), format="gguf")
    export(adapter, first.with_name("third.gguf"), format="gguf", dtype="f16")
    assert sorted(path.name for path in first.parent.iterdir()) == ["cllm.json", "first.gguf", "third.gguf"]


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True}, {"head_dim": 32}])
def test_members_of_the_family_give_the_same_logits(
    export: Export, tiny_llama: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.update(changes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "folder")
    build_tokenizer().save_pretrained(tmp_path / "folder")
    path = export(tmp_path / "folder", tmp_path / "tiny.gguf", format="gguf")
    assert torch.equal(read_back(path), plain_logits(tmp_path / "folder"))


def test_the_tokenizer_read_back_is_the_same(export: Export, tiny_llama: Path, tmp_path: Path) -> None:
    path = export(tiny_llama, tmp_path / "tiny.gguf", format="gguf")
    ours, theirs = (
        AutoTokenizer.from_pretrained(tiny_llama),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name),
    )
    text = "<|im_start|>user\nThe server reads 42 tokens.<|im_end|>"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.chat_template == CHATML_TEMPLATE
    assert field(path, "tokenizer.ggml.eos_token_id") == IM_END_ID
    assert field(path, "tokenizer.ggml.add_bos_token") is False


@pytest.mark.parametrize(
    ("word", "splitter", "model"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
        (
            "smollm",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            {},
        ),
        (
            "llama-bpe",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            {"ignore_merges": True},
        ),
    ],
)
def test_the_way_texts_are_split_is_called_as_llama_cpp_calls_it(
    export: Export, tmp_path: Path, word: str, splitter: pre_tokenizers.PreTokenizer, model: dict[str, object]
) -> None:
    folder = write_variant(tmp_path / "folder", splitter, **model)
    path = export(folder, tmp_path / "tiny.gguf", format="gguf")
    assert field(path, "tokenizer.ggml.pre") == word


def test_a_tokenizer_that_llama_cpp_might_run_otherwise_is_refused(export: Export, tmp_path: Path) -> None:
    folder = write_variant(tmp_path / "folder", pre_tokenizers.Whitespace())
    with pytest.raises(ModelLoadError, match=r"splits texts in another way.*convert_hf_to_gguf.py"):
        export(folder, tmp_path / "tiny.gguf", format="gguf")


def test_a_tokenizer_that_changes_the_text_is_refused(export: Export, tmp_path: Path) -> None:
    folder = write_variant(tmp_path / "folder", pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelLoadError, match="changes the text"):
        export(folder, tmp_path / "tiny.gguf", format="gguf")


@pytest.mark.parametrize("architecture", ["mistral", "qwen2-sliding"])
def test_what_llama_cpp_has_no_place_for_is_refused_with_a_remedy(
    export: Export, tiny_checkpoint: CheckpointFactory, tmp_path: Path, architecture: Architecture
) -> None:
    with pytest.raises(ModelLoadError, match=r"sliding_window 24|layer_types .*sliding_attention") as error:
        export(tiny_checkpoint(architecture), tmp_path / "tiny.gguf", format="gguf")
    assert "convert_hf_to_gguf.py" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rope_type dynamic"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_name(
    export: Export, tiny_llama: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.update(changes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "folder")
    build_tokenizer().save_pretrained(tmp_path / "folder")
    with pytest.raises(ModelLoadError, match=named):
        export(tmp_path / "folder", tmp_path / "tiny.gguf", format="gguf")


def test_rotary_halves_become_neighbours() -> None:
    weight = torch.arange(8).reshape(8, 1)  # two heads of size 4
    assert interleave_rotary(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
