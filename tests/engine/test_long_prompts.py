"""Prompts longer than the token budget of a step, in bfloat16: the first of their steps want no logits at all."""

from pathlib import Path
from typing import Literal

import pytest

from cllm_core.backends.cpu import backend as cpu_backend
from cllm_core.backends.cpu.library import load_library
from cllm_core.config import EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.models.embedded import cache_folder
from cllm_core.request import SamplingParams
from tests.engine.factories import Answer, decode_one, make_request

PROMPT = tuple(range(3, 103))
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def answer(
    model: Path, max_batched_tokens: int, *, quantization: Literal["int8"] | None = None, native_kernels: bool = True
) -> Answer:
    config = EngineConfig(
        model=str(model),
        dtype="bfloat16",
        device="cpu",
        num_cache_blocks=16,
        max_num_seqs=4,
        max_batched_tokens=max_batched_tokens,
        quantization=quantization,
        native_kernels=native_kernels,
    )
    return decode_one(build_engine(config), make_request("a", PROMPT, PARAMS))


@pytest.mark.parametrize("native_model", [False, True])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_prompt_read_in_chunks_is_answered_as_one_read_at_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, quantization: Literal["int8"] | None, native_model: bool
) -> None:
    """The kernels' output layer could not be asked for the logits of no token, which ended the worker."""
    if load_library(cache_folder()) is None:
        pytest.skip("there are no C kernels for this processor, or no C compiler")
    if not native_model:
        monkeypatch.setattr(cpu_backend, "prove_native_model", lambda *_: None)
    in_chunks = answer(tiny_llama, 16, quantization=quantization)
    at_once = answer(tiny_llama, 256, quantization=quantization)
    assert len(in_chunks.token_ids) == 12
    assert in_chunks.token_ids == at_once.token_ids


def test_a_prompt_is_read_in_chunks_without_kernels_too(tiny_llama: Path) -> None:
    assert len(answer(tiny_llama, 16, native_kernels=False).token_ids) == 12
