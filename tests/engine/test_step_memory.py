"""The memory of steps is measured without leaving the model's limits, and has room for sampling."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config

from cllm_core.backends.paged_model import PagedModel
from cllm_core.config import EngineConfig
from cllm_core.engine import memory, sampling
from cllm_core.engine.memory import activation_bytes, step_bytes
from cllm_core.engine.sampling import drawing_bytes
from cllm_core.engine.sampling_batch import Draw
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from tests.backends.factories import by_tables


def paged_gpt2() -> PagedModel:
    """Of 32 positions and 64 tokens."""
    register_paged_attention()
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=PAGED_ATTENTION)
    return by_tables(model.eval())


def test_more_tokens_than_a_model_has_positions_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions ran on beyond the learned ones: on a device an assertion that ends the process."""
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    assert activation_bytes(paged_gpt2(), num_tokens=70, block_size=16, max_model_len=32) == 0


def peak_bytes_of_drawing(logits: Tensor, *, truncates: bool) -> int:
    """Memory that drawing at all rows of the logits takes beside them."""
    count = len(logits)
    group = Draw(
        positions=torch.arange(count),
        keys=torch.arange(2 * count).view(count, 2),
        temperature=torch.ones(count),
        top_k=torch.full((count,), logits.shape[1] - 1) if truncates else None,
        max_top_k=logits.shape[1] - 1,
        top_p=torch.full((count,), 0.9) if truncates else None,
        min_p=torch.full((count,), 0.01) if truncates else None,
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        sampling._draw(logits, group)
    assert recorded.profiler is not None
    changes = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(max(accumulate(changes)))


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("num_positions", [4, 64])  # a part of a chunk, and four chunks
def test_drawing_stays_within_its_memory(truncates: bool, num_positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries of draws were not counted: more than all the rest where a vocabulary is small."""
    vocab_size = 2**14
    for name in ("_CPU_CHUNK", "_DEVICE_CHUNK"):
        monkeypatch.setattr(sampling, name, 16 * vocab_size)
    taken = peak_bytes_of_drawing(torch.randn(num_positions, vocab_size), truncates=truncates)
    # Half of it, and for top-p the rest in a sort on a device.
    assert 28 / 56 <= taken / drawing_bytes(num_positions, vocab_size) < 1


def test_steps_have_room_for_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "activation_bytes", lambda *_: 0)
    assert step_bytes(paged_gpt2(), EngineConfig(max_batched_tokens=48), 32) > drawing_bytes(48, 64)
    # 28 to 56 bytes of each logit of a chunk, however many positions there are
    assert 2**24 * 28 < drawing_bytes(10**9, 151_936) < 2**30
