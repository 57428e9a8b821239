"""Bloom: queries, keys and values in one product, ALiBi."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from cllm_core.models.attention import Scoring, current_step


class PagedBloomAttention(BloomAttention):
    """BloomAttention inside of a step."""

    def forward(self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """See BloomAttention; hidden_states [1, T, H * D]."""
        step = current_step()
        if step is None:
            outside: tuple[Tensor, Any] = super().forward(hidden_states, residual, *args, **kwargs)
            return outside
        query, key, value = (heads[0].transpose(0, 1) for heads in self._reshape(self.query_key_value(hidden_states)))
        two_tokens = torch.ones(1, 2, device=hidden_states.device)
        slopes = build_alibi_tensor(two_tokens, self.num_heads, torch.float32)[:, 0, 1]
        assert self.layer_idx is not None
        attended = step.attend(self.layer_idx, query, key, value, Scoring(self.inv_norm_factor, slopes=slopes))
        out = self.dense(attended.reshape(1, len(query), -1))
        return residual + out, None
