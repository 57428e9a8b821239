"""Decoder layers of the common shape with fewer, larger operations: what prepacked weights leave of a step on a CPU is
mostly the cost of calling many small ones, and on a GPU that of waiting for each. `fusing` puts them in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.backends.cpu.products import PanelGate, PanelProduct, can_multiply
from cllm_core.backends.cuda.layer_kernels import LayerKernels
from cllm_core.backends.cuda.products import PlainGate, PlainProduct
from cllm_core.backends.products import GatedProduct, PackedGate, PackedProduct, Product
from cllm_core.backends.step_tables import TableStep
from cllm_core.models.adapter_bank import AdaptedProduct, AdapterBank
from cllm_core.models.attention import PagedAttention


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
    scale: float
    window: int | None


class FusedLayer(nn.Module):
    """Computes what `layer` does: one product for queries, keys and values; activation, gate and residual sums inside
    the matrix products where the kernels can.

    Args:
        layer: of the common shape.
        call: what it asks of its attention.
        rotation: shared by the layers that turn their heads alike.
        kernels: compute norms, and products of sizes that they take; None: torch does.
        adapters: of the layer; None: there are none.
        layer_kernels: compute on a CUDA device what lies between the products; None: torch does.
    """

    def __init__(
        self,
        layer: nn.Module,
        call: AttentionCall,
        rotation: "Rotation",
        kernels: Kernels | None = None,
        adapters: "LayerAdapters | None" = None,
        *,
        layer_kernels: LayerKernels | None = None,
    ) -> None:
        super().__init__()
        attention = layer.get_submodule("self_attn")
        self.call = call
        self.rotation = rotation
        self.layer_kernels = layer_kernels
        self.input_norm = Norm.of(layer.get_submodule("input_layernorm"), kernels)
        self.mlp_norm = Norm.of(layer.get_submodule("post_attention_layernorm"), kernels)
        has_head_norms = "q_norm" in dict(attention.named_children())
        self.query_norm = Norm.of(attention.get_submodule("q_norm"), kernels) if has_head_norms else None
        self.key_norm = Norm.of(attention.get_submodule("k_norm"), kernels) if has_head_norms else None
        products = _Products(layer, kernels, adapters, layer_kernels)
        self.qkv = products.of("self_attn", "q_proj", "k_proj", "v_proj")
        self.out = products.of("self_attn", "o_proj")
        self.gated = products.gated("mlp", "gate_proj", "up_proj")
        self.down = products.of("mlp", "down_proj")
        self.mlp_size = products.num_outputs("mlp", "gate_proj")

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
        if self.layer_kernels is not None and isinstance(paged, TableStep):
            places = paged.places(call.layer)
            query = self.layer_kernels.turn_and_store(query, key, value, factors=position_embeddings, places=places)
            out = paged.attend_stored(call.layer, query, scale=call.scale, window=call.window)
        else:
            turning = heads[:, :-num_kv_heads] if self.query_norm is None else torch.cat((query, key), dim=1)
            query, key = self.rotation(turning, *position_embeddings).split((num_heads, num_kv_heads), dim=1)
            out = paged.attend(call.layer, query, key, value, scale=call.scale, window=call.window)
        return out.reshape(normed.shape[0], -1)


class Rotation:
    """Rotary embedding of queries and keys at once, by the cosines and sines that transformers made for the step."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        self._kernels = kernels
        self._sin: Tensor | None = None
        self._factors: tuple[Tensor, Tensor] | None = None

    def __call__(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, H, D] by [1, T, D] each: heads * cos + rotate_half(heads) * sin; `heads` may be overwritten."""
        if self._kernels is not None:
            self._kernels.rotate_(heads, cos, sin)
            return heads
        if self._factors is None or sin is not self._sin:  # once per step: all layers get the same tensors
            minus, plus = sin[0].chunk(2, dim=-1)
            self._factors = cos[0, :, None], torch.cat((-minus, plus), dim=-1)[:, None]
            self._sin = sin
        factor, swapped_factor = self._factors
        first, second = heads.chunk(2, dim=-1)
        return torch.addcmul(heads * factor, torch.cat((second, first), dim=-1), swapped_factor)


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm."""

    weight: Tensor
    epsilon: float
    kernels: Kernels | None

    @classmethod
    def of(cls, module: nn.Module, kernels: Kernels | None) -> "Norm":
        """Of a norm of transformers."""
        weight, epsilon = module.weight, module.variance_epsilon
        assert isinstance(weight, Tensor)
        assert isinstance(epsilon, float)
        return cls(weight.detach().clone(), epsilon, kernels)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., H] to the same."""
        if self.kernels is not None:
            return self.kernels.rms_norm(x, self.weight, self.epsilon)
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True, slots=True)
class LayerAdapters:
    """What adapters add to the products of one decoder layer.

    Attributes:
        bank: of the model.
        layer: name of the layer in the model.
    """

    bank: AdapterBank
    layer: str

    @classmethod
    def of(cls, bank: AdapterBank | None, layer: str) -> "LayerAdapters | None":
        """None where there is no bank."""
        return None if bank is None else cls(bank, layer)

    def product(self, part: str, *names: str) -> AdaptedProduct:
        """Of these linear layers of a part of the layer, as one."""
        return self.bank.product(*(f"{self.layer}.{part}.{name}" for name in names))


@dataclass(frozen=True, slots=True)
class _Products:
    """Makes the products of a layer."""

    layer: nn.Module
    kernels: Kernels | None
    adapters: LayerAdapters | None
    layer_kernels: LayerKernels | None

    def of(self, part: str, *names: str) -> Product:
        """The linear layers of these names in a part of the layer, outputs side by side."""
        linears = self._linears(part, names)
        adapted = None if self.adapters is None else self.adapters.product(part, *names)
        if linears[0].weight.is_cuda:
            return PlainProduct.of(linears, adapted)
        if self.kernels is not None and can_multiply(self.kernels, linears):
            return PanelProduct.of(linears, self.kernels, adapted)
        return PackedProduct.of(linears, adapted)

    def gated(self, part: str, gate: str, up: str) -> GatedProduct:
        """Two linear layers, of which one gates the other."""
        first, second = self._linears(part, (gate, up))
        if first.weight.is_cuda:
            return PlainGate(self.of(part, gate, up), self.layer_kernels)
        own, other = (None if self.adapters is None else self.adapters.product(part, name) for name in (gate, up))
        if self.kernels is not None and can_multiply(self.kernels, (first, second)):
            return PanelGate.of(first, second, self.kernels, (own, other))
        return PackedGate(PackedProduct.of([first], own), PackedProduct.of([second], other))

    def num_outputs(self, part: str, name: str) -> int:
        """Outputs of one linear layer."""
        (linear,) = self._linears(part, (name,))
        return linear.out_features

    def _linears(self, part: str, names: Sequence[str]) -> list[nn.Linear]:
        linears = [self.layer.get_submodule(f"{part}.{name}") for name in names]
        assert all(isinstance(linear, nn.Linear) for linear in linears)
        return linears  # type: ignore[return-value]  # asserted above
