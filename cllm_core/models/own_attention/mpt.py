"""MPT: queries, keys and values in one product, which may be clipped; ALiBi."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from cllm_core.models.attention import Scoring, current_step


class PagedMptAttention(MptAttention):
    """MptAttention inside of a step."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """See MptAttention; hidden_states [1, T, H * D]."""
        step = current_step()
        if step is None:
            outside: tuple[Tensor, Any] = super().forward(hidden_states, *args, **kwargs)
            return outside
        projected = self.Wqkv(hidden_states[0])
        if self.clip_qkv:
            projected = projected.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = projected.view(len(projected), 3, self.n_heads, self.head_dim).unbind(1)
        biases = build_mpt_alibi_tensor(self.n_heads, 2, device=hidden_states.device)[:, 0]
        slopes = torch.diff(biases)[:, 0]
        assert self.layer_idx is not None
        assert self.softmax_scale is not None
        attended = step.attend(self.layer_idx, query, key, value, Scoring(self.softmax_scale, slopes=slopes))
        return self.out_proj(attended.reshape(1, len(query), -1)), None
