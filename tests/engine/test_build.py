"""An engine from settings alone: what it reports, what it refuses, and that it decodes."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from cllm_core.backends import choose
from cllm_core.backends.cpu.library import load_library
from cllm_core.config import DEFAULT_BLOCK_LENGTH, EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.errors import ConfigError
from cllm_core.models.embedded import cache_folder
from cllm_core.request import SamplingParams
from tests.checkpoints import (
    ENDOFTEXT_ID,
    IM_END_ID,
    IM_START_ID,
    MAX_POSITIONS,
    VOCAB_SIZE,
    build_tokenizer,
    draw_weights,
)
from tests.engine.factories import decode_one, greedy_ar, make_request

PROMPT = (40, 50, 60, 70)


def test_the_engine_of_a_checkpoint_decodes_what_transformers_does(tiny_llama: Path) -> None:
    engine = build_engine(EngineConfig(model=str(tiny_llama), dtype="float32", device="cpu", num_cache_blocks=8))
    params = SamplingParams(temperature=0, max_tokens=20)
    answer = decode_one(engine, make_request("a", PROMPT, params))
    assert answer.token_ids == greedy_ar(AutoModelForCausalLM.from_pretrained(tiny_llama), PROMPT, 20)


def test_info_reports_the_limits_in_force(tiny_llama: Path) -> None:
    config = EngineConfig(model=str(tiny_llama), device="cpu", num_cache_blocks=8, cache_block_size=4, max_num_seqs=3)
    info = build_engine(config).info
    assert (info.max_model_len, info.num_cache_blocks, info.cache_block_size) == (32, 8, 4)
    assert (info.block_length, info.max_num_seqs) == (DEFAULT_BLOCK_LENGTH, 3)
    assert (info.vocab_size, info.eos_token_ids) == (VOCAB_SIZE, (ENDOFTEXT_ID, IM_END_ID))
    assert info.cache_bytes == 8 * 4 * 2 * 2 * 2 * 16 * 4  # blocks, tokens, layers, k and v, heads, head size, bytes
    assert info.weight_bytes == 4 * info.num_parameters


def test_the_block_length_of_the_settings_wins_over_the_default(tiny_llama: Path) -> None:
    config = EngineConfig(model=str(tiny_llama), device="cpu", num_cache_blocks=8, block_length=3)
    assert build_engine(config).info.block_length == 3


def test_a_roomy_cache_leaves_the_context_of_the_model(tiny_llama: Path) -> None:
    config = EngineConfig(model=str(tiny_llama), device="cpu", cache_memory_gib=0.01)
    assert build_engine(config).info.max_model_len == MAX_POSITIONS


@pytest.mark.parametrize("num_positions", [2, 24])
def test_a_model_of_few_learned_positions_is_served(tmp_path: Path, num_positions: int) -> None:
    """Steps were timed up to 128 tokens, beyond the table of positions of such a model."""
    shape: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**shape, n_positions=num_positions, bos_token_id=IM_START_ID, eos_token_id=IM_END_ID)
    reference = AutoModelForCausalLM.from_config(config).eval()
    draw_weights(reference, seed=0)
    reference.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    engine = build_engine(EngineConfig(model=str(tmp_path), dtype="float32", device="cpu", num_cache_blocks=8))
    assert engine.info.max_model_len == num_positions
    params = SamplingParams(temperature=0, max_tokens=num_positions - 1, ignore_eos=True)
    answer = decode_one(engine, make_request("a", PROMPT[:1], params))
    assert answer.token_ids == greedy_ar(reference, PROMPT[:1], num_positions - 1)


@pytest.mark.parametrize(
    ("max_model_len", "message"),
    [
        (MAX_POSITIONS + 1, f"the model was built for {MAX_POSITIONS} tokens; lower it"),
        (200, "the KV cache holds 128 tokens"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(tiny_llama: Path, max_model_len: int, message: str) -> None:
    config = EngineConfig(model=str(tiny_llama), device="cpu", num_cache_blocks=8, max_model_len=max_model_len)
    with pytest.raises(ConfigError, match=message):
        build_engine(config)


def test_progress_only_moves_forward_and_ends_with_the_whole(tiny_llama: Path) -> None:
    heard: list[tuple[str, float]] = []
    build_engine(
        EngineConfig(model=str(tiny_llama), device="cpu", num_cache_blocks=8),
        on_progress=lambda stage, fraction: heard.append((stage, fraction)),
    )
    fractions = [fraction for _, fraction in heard]
    assert fractions == sorted(fractions)
    assert heard[-1] == ("ready", 1.0)


def test_quantisation_the_kernels_cannot_honour_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels, a number format found out only at load, and a cache that the kernels do not read."""
    refused = [
        EngineConfig(model=str(tiny_llama), device="cpu", num_cache_blocks=8, quantization="int8"),
        EngineConfig(model=str(tiny_llama), device="cpu", dtype="bfloat16", cache_block_size=8, quantization="int8"),
    ]
    for config in refused:
        with pytest.raises(ConfigError, match=r"quantization='int8'.*leave out quantization"):
            build_engine(config)
    monkeypatch.setattr(choose, "load_kernels", lambda folder, isa: None)
    with pytest.raises(ConfigError, match="there are no C kernels"):
        build_engine(EngineConfig(model=str(tiny_llama), device="cpu", dtype="bfloat16", quantization="int8"))


def test_info_tells_of_rounded_weights(tiny_llama: Path) -> None:
    if load_library(cache_folder()) is None:
        pytest.skip("there are no C kernels for this processor, or no C compiler")
    config = EngineConfig(model=str(tiny_llama), device="cpu", dtype="bfloat16", num_cache_blocks=8)
    plain, rounded = (build_engine(msgspec.structs.replace(config, quantization=name)).info for name in (None, "int8"))
    assert (plain.number_format, rounded.number_format) == ("bfloat16", "bfloat16, int8 weights")
    assert 0.5 * plain.weight_bytes < rounded.weight_bytes < 0.7 * plain.weight_bytes  # embeddings stay bfloat16
    assert rounded.num_parameters == plain.num_parameters


@pytest.mark.parametrize("other", [{"device": "cuda"}, {"dtype": "float32"}, {"native_kernels": False}])
def test_quantisation_does_not_go_with_what_the_kernels_lack(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"quantization='int8': does not go with {next(iter(other))}="):
        EngineConfig(quantization="int8", **other)
