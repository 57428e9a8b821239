"""Decoder layers of the common shape with fewer, larger operations: what prepacked weights leave of a step on a CPU is
mostly the cost of calling many small ones, and on a GPU that of waiting for each. `fusing` puts them in place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cllm_core.backends.layer_ops import LayerOps, Rope
from cllm_core.backends.step_tables import TableStep
from cllm_core.models.attention import PagedAttention, Scoring


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Attention heads of a layer."""

    num_heads: int
    num_kv_heads: int
    size: int


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asks of its attention; see PagedAttention.attend."""

    layer: int
    heads: HeadShape
    scoring: Scoring


class FusedLayer(nn.Module):
    """Computes what `layer` does: one product for queries, keys and values; activation, gate and residual sums inside
    the matrix products where the backend can.

    Args:
        layer: of the common shape.
        call: what it asks of its attention.
        rope: shared by the layers that get the same factors.
        ops: make its parts.
        name: of the layer in the model.
    """

    def __init__(self, layer: nn.Module, call: AttentionCall, rope: Rope, ops: LayerOps, *, name: str = "") -> None:
        super().__init__()

        def linears(*names: str) -> dict[str, nn.Linear]:
            return {f"{name}.{part}": _linear(layer, part) for part in names}

        attention = layer.get_submodule("self_attn")
        self.call = call
        self.rope = rope
        self.rope_store = ops.rope_store
        self.input_norm = ops.norm(layer.get_submodule("input_layernorm"))
        self.mlp_norm = ops.norm(layer.get_submodule("post_attention_layernorm"))
        has_head_norms = "q_norm" in dict(attention.named_children())
        self.query_norm = ops.norm(attention.get_submodule("q_norm")) if has_head_norms else None
        self.key_norm = ops.norm(attention.get_submodule("k_norm")) if has_head_norms else None
        self.qkv = ops.product(linears("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        self.out = ops.product(linears("self_attn.o_proj"))
        self.gated = ops.gated_product(linears("mlp.gate_proj"), linears("mlp.up_proj"))
        self.down = ops.product(linears("mlp.down_proj"))
        self.mlp_size = _linear(layer, "mlp.gate_proj").out_features

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], paged: PagedAttention, **_: object
    ) -> Tensor:
        """[1, T, H] to the same; `hidden_states` may be overwritten.

        The keyword arguments are those of transformers' layers, unused ones ignored.
        """
        residual = hidden_states[0]
        attended = self._attend(self.input_norm(residual), position_embeddings, paged)
        residual = self.out.plus(attended, residual)
        return self.down.plus(self.gated(self.mlp_norm(residual)), residual)[None]

    def _attend(self, normed: Tensor, position_embeddings: tuple[Tensor, Tensor], paged: PagedAttention) -> Tensor:
        call, num_heads, num_kv_heads = self.call, self.call.heads.num_heads, self.call.heads.num_kv_heads
        heads = self.qkv(normed).view(-1, num_heads + 2 * num_kv_heads, call.heads.size)
        query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope_store is not None and isinstance(paged, TableStep):
            slots = paged.slots(call.layer)
            query = self.rope_store.rope_and_store_kv(query, key, value, factors=position_embeddings, slots=slots)
            out = paged.attend_stored(call.layer, query, call.scoring)
        else:
            both = heads[:, :-num_kv_heads] if self.query_norm is None else torch.cat((query, key), dim=1)
            query, key = self.rope(both, *position_embeddings).split((num_heads, num_kv_heads), dim=1)
            out = paged.attend(call.layer, query, key, value, call.scoring)
        return out.reshape(normed.shape[0], -1)


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
