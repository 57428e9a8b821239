"""What a fused decoder layer is made of: matrix products, norms and rotary embedding, here by torch alone.

A backend derives its own LayerOps. Where tokens of the step have adapters, the adapters' share is added to a product
before anything that is not a sum.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cllm_core.backends.step_tables import CacheSlots
from cllm_core.models.adapter_bank import AdaptedProduct, AdapterBank


class Product(Protocol):
    """x @ weight.T + bias of one linear layer, or of several side by side."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        ...

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product and `other` [T, out] added; `other` may be overwritten."""
        ...


class GatedProduct(Protocol):
    """silu(gate(x)) * up(x) of two linear layers."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        ...


class Rope(Protocol):
    """Rotary embedding of queries and keys at once, by the cosines and sines that transformers made for the step."""

    def __call__(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, H, D] by [1, T, D] each: heads * cos + rotate_half(heads) * sin; `heads` may be overwritten."""
        ...


class RopeStore(Protocol):
    """RoPE and the write to the KV cache in one."""

    def rope_and_store_kv(
        self, query: Tensor, key: Tensor, value: Tensor, *, factors: tuple[Tensor, Tensor], slots: CacheSlots
    ) -> Tensor:
        """Apply RoPE to queries [T, H, D] and keys [T, H_kv, D], write keys and values; returns the queries."""
        ...


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., H] to the same."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class LayerOps:
    """Makes the parts of fused layers.

    Args:
        adapters: whose share the products add; None: there are none.

    Attributes:
        rope_store: applies RoPE and stores keys and values in one, in steps that have tables; None: separately.
    """

    rope_store: RopeStore | None = None

    def __init__(self, adapters: AdapterBank | None = None) -> None:
        self._adapters = adapters

    def product(self, linears: Mapping[str, nn.Linear]) -> Product:
        """Of linear layers by their names in the model, outputs side by side."""
        return TorchProduct(*side_by_side(linears.values()), self.adapted(*linears))

    def gated_product(self, gate: Mapping[str, nn.Linear], up: Mapping[str, nn.Linear]) -> GatedProduct:
        """Of two linear layers, each by its name in the model."""
        return TorchGate(self.product({**gate, **up}))

    def norm(self, module: nn.Module) -> Norm:
        """Of a norm of transformers."""
        return Norm(*norm_parameters(module))

    def rope(self) -> Rope:
        """For all layers that get the same factors."""
        return TorchRope()

    def in_float32(self) -> "LayerOps":
        """Ops that take float32 and no adapters, by which a fused layer is proved; as many of these as can."""
        return LayerOps()

    def adapted(self, *names: str) -> AdaptedProduct | None:
        """What adapters add to the product of these linear layers, outputs side by side."""
        return None if self._adapters is None else self._adapters.product(*names)


@dataclass(frozen=True, slots=True)
class TorchProduct:
    """Product with the weights as they are."""

    weight: Tensor
    bias: Tensor | None
    adapters: AdaptedProduct | None

    def __call__(self, x: Tensor) -> Tensor:
        """See Product."""
        return add_adapted(F.linear(x, self.weight, self.bias), x, self.adapters)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """See Product."""
        if self.bias is not None:
            return self(x).add_(other)
        # cuBLAS adds to what lies where it writes: no kernel of its own for the sum.
        return add_adapted(other.addmm_(x, self.weight.t()), x, self.adapters)


@dataclass(frozen=True, slots=True)
class TorchGate:
    """GatedProduct by one product for both layers; that of few tokens is read from memory faster than two halves."""

    both: Product

    def __call__(self, x: Tensor) -> Tensor:
        """See GatedProduct."""
        gate, up = self.both(x).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class TorchRope:
    """Rope by torch."""

    def __init__(self) -> None:
        self._sin: Tensor | None = None
        self._factors: tuple[Tensor, Tensor] | None = None

    def __call__(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See Rope."""
        if self._factors is None or sin is not self._sin:  # once per step: all layers get the same tensors
            minus, plus = sin[0].chunk(2, dim=-1)
            self._factors = cos[0, :, None], torch.cat((-minus, plus), dim=-1)[:, None]
            self._sin = sin
        factor, swapped_factor = self._factors
        first, second = heads.chunk(2, dim=-1)
        return torch.addcmul(heads * factor, torch.cat((second, first), dim=-1), swapped_factor)


def norm_parameters(module: nn.Module) -> tuple[Tensor, float]:
    """A copy of the weight, and the epsilon, of a norm of transformers."""
    weight, epsilon = module.weight, module.variance_epsilon
    assert isinstance(weight, Tensor)
    assert isinstance(epsilon, float)
    return weight.detach().clone(), epsilon


def side_by_side(linears: Iterable[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of linear layers as one; all of them have a bias or none has.

    The weight of a single layer is not copied.
    """
    layers = list(linears)
    weights = [linear.weight.detach() for linear in layers]
    biases = [linear.bias.detach() for linear in layers if linear.bias is not None]
    return weights[0] if len(weights) == 1 else torch.cat(weights), torch.cat(biases) if biases else None


def is_adapted(adapters: AdaptedProduct | None) -> bool:
    """Whether a token of the step has an adapter."""
    return adapters is not None and adapters.is_active


def add_adapted(out: Tensor, x: Tensor, adapters: AdaptedProduct | None) -> Tensor:
    """`out`, with the adapters' share for the inputs `x` added in place."""
    if adapters is not None and adapters.is_active:
        adapters.add_to(out, x)
    return out
