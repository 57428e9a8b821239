"""Falcon: queries, keys and values in one product, laid out in three ways; RoPE."""

from typing import Any

from torch import Tensor
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import Scoring, current_step


class PagedFalconAttention(FalconAttention):
    """FalconAttention inside of a step."""

    def forward(self, hidden_states: Tensor, alibi: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """See FalconAttention; hidden_states [1, T, H * D].

        Raises:
            ModelLoadError: the model has ALiBi, which transformers adds once or twice, by how it attends.
        """
        step = current_step()
        if step is None:
            outside: tuple[Tensor, Any] = super().forward(hidden_states, alibi, *args, **kwargs)
            return outside
        if alibi is not None:
            raise ModelLoadError(
                "Falcon with ALiBi is not supported: transformers computes it in two ways that disagree"
            )
        assert self.layer_idx is not None
        query, key, value = self._split_heads(self.query_key_value(hidden_states))
        cos, sin = kwargs["position_embeddings"]
        query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
        attended = step.attend(self.layer_idx, query[0], key[0], value[0], Scoring(self.inv_norm_factor))
        return self.dense(attended.reshape(1, len(query[0]), -1)), None
