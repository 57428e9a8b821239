"""What of a GGUF file would not be computed is refused in one line that names it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cllm_core.errors import ModelLoadError
from cllm_core.models.gguf.file import Value
from tests.checkpoints import VOCAB_SIZE, write_gguf
from tests.models.conftest import Load
from tests.models.gguf.editing import edit_gguf

Edited = Callable[[dict[str, Value | None], dict[str, np.ndarray | None]], Path]


@pytest.fixture
def edited(tiny_llama: Path, tmp_path: Path) -> Edited:
    """The tiny Llama as a file with these keys and tensors changed."""
    source = write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    return lambda keys, tensors: edit_gguf(source, tmp_path / "edited.gguf", keys, tensors)


def refusal(load: Load, path: Path) -> str:
    """The message that loading ends with."""
    with pytest.raises(ModelLoadError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.attention.scale", 0.3, "keys that are not known (1: llama.attention.scale)"),
        ("llama.attention.sliding_window", 8, "keys that are not known (1: llama.attention.sliding_window)"),
        ("llama.expert_count", 8, "llama.expert_count is 8, but mixtures of experts"),
        ("llama.attention.causal", False, "llama.attention.causal is False, but only causal models"),
        ("llama.attention.head_count_kv", np.array([2, 1], np.int32), "head_count_kv is an array of 2, must be one"),
        ("llama.attention.value_length", 8, "llama.attention.value_length is 8, but attention.key_length is 16"),
        ("llama.rope.dimension_count", 8, "llama.rope.dimension_count is 8, but heads of 16 are rotated as a whole"),
        ("llama.rope.scaling.type", "ntk", "llama.rope.scaling.type is 'ntk', not known"),
        ("llama.rope.scaling.type", "longrope", "rope.scaling.type is 'longrope', but the file has no factors"),
        ("llama.context_length", "long", "llama.context_length is 'long', must be one whole number"),
        ("llama.context_length", None, "has no llama.context_length"),
        ("llama.attention.head_count", 0, "cannot read the configuration"),
        ("llama.vocab_size", 99, f"llama.vocab_size is 99, but token_embd.weight has {VOCAB_SIZE} rows"),
        ("qwen2.context_length", 8, "keys that llama does not have (1: qwen2.context_length)"),
        ("general.architecture", "rwkv7", "architecture rwkv7 is not read from GGUF"),
        ("general.type", "adapter", "holds no model (general.type is adapter)"),
        ("split.count", 3, "is a part of a model split into 3 files; name the one ending in -00001-of-00003.gguf"),
        ("tokenizer.ggml.eos_token_id", 99_999, f"eos_token_id is 99999, but the vocabulary has {VOCAB_SIZE} tokens"),
        ("tokenizer.ggml.bos_token_id", 2**32 - 1, "tokenizer.ggml.bos_token_id is 4294967295, but the vocabulary"),
        ("tokenizer.ggml.fim_pre_token_id", VOCAB_SIZE, "tokenizer.ggml.fim_pre_token_id is 384, but the vocabulary"),
        ("tokenizer.ggml.tokens", ["a", "b", "c"], "token_type is an array of 384, but there are 3 tokens"),
        ("tokenizer.ggml.pre", "klingon", "tokenizer.ggml.pre is 'klingon', but only gpt-2,"),
        ("tokenizer.ggml.model", "t5", "tokenizer.ggml.model is 't5', but only gpt2"),
        ("tokenizer.ggml.suppress_tokens", np.array([5], np.int32), "(1: tokenizer.ggml.suppress_tokens)"),
        ("tokenizer.ggml.merges", None, "has no tokenizer.ggml.merges"),
    ],
)
def test_a_key_is_named(load: Load, edited: Edited, key: str, value: Value | None, said: str) -> None:
    assert said in refusal(load, edited({key: value}, {}))


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("blk.0.attn_gate.weight", np.ones((4, 4)), "tensors that llama does not know (1: blk.0.attn_gate.weight)"),
        ("blk.0.attn_q.scale", np.ones(1), "tensors that llama does not know (1: blk.0.attn_q.scale)"),
        ("blk.0.attn_qkv.weight", np.ones((4, 4)), "tensors that llama does not know (1: blk.0.attn_qkv.weight)"),
        ("blk.1.attn_q.bias", np.ones(64), "weights are there that the architecture has no place for"),
        ("blk.0.ffn_up.weight", None, "weights are missing"),
        ("token_embd.weight", None, "has no matrix token_embd.weight"),
        ("blk.0.ffn_up.weight", np.ones((4, 4)), "weights have another shape"),
        ("rope_freqs.weight", np.ones(5), "rope.dimension_count is 16, but rope_freqs.weight has the shape (5,)"),
    ],
)
def test_a_tensor_is_named(load: Load, edited: Edited, name: str, tensor: np.ndarray | None, said: str) -> None:
    assert said in refusal(load, edited({}, {name: tensor}))


@pytest.mark.parametrize("size", [0, 3, 8, 200, 5_000, 60_000])
def test_a_file_that_is_cut_off_is_refused(load: Load, edited: Edited, tmp_path: Path, size: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(edited({}, {}).read_bytes()[:size])
    assert "fetch it again" in refusal(load, cut)


def test_random_bytes_behind_the_magic_are_refused(load: Load, tmp_path: Path) -> None:
    """A count of keys or tokens from anywhere must not ask for memory before the file turns out to be too short."""
    generator = np.random.default_rng(0)
    for number in range(50):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(b"GGUF\3\0\0\0" + generator.bytes(400))
        assert "fetch it again" in refusal(load, path)
