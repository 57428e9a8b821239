"""The memory of steps is measured without leaving the model's limits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from cllm_core.engine.recording import activation_bytes
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.model import PagedModel


def test_more_tokens_than_a_model_has_positions_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions ran on beyond the learned ones: on a device an assertion that ends the process."""
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    register_paged_attention()
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=PAGED_ATTENTION)
    paged = PagedModel(model.eval())
    assert activation_bytes(paged, num_tokens=70, block_size=16, max_model_len=32) == 0
