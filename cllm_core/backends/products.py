"""The matrix products of a fused decoder layer, with weights laid out once: by oneDNN here, by our own kernels in
`native.products`. Where tokens of the step have adapters, their share comes before everything that is not a sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cllm_core.backends.cpu.packed_linear import pack_weight
from cllm_core.models.adapter_bank import AdaptedProduct


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


@dataclass(frozen=True, slots=True)
class PackedProduct:
    """Product by oneDNN, which can do something to a result before it is written."""

    weight: Tensor
    bias: Tensor | None
    adapters: AdaptedProduct | None

    @classmethod
    def of(cls, linears: Sequence[nn.Linear], adapters: AdaptedProduct | None) -> "PackedProduct":
        """These linear layers side by side."""
        weight, bias = side_by_side(linears)
        return cls(pack_weight(weight), bias, adapters)

    def __call__(self, x: Tensor) -> Tensor:
        """See `products`."""
        return add_adapted(self._unary(x, "none"), x, self.adapters)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        return F.silu(self(x), inplace=True) if is_adapted(self.adapters) else self._unary(x, "swish")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """See Product."""
        return add_adapted(self._binary(x, other, "add"), x, self.adapters)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times `other`, element by element."""
        return self(x).mul_(other) if is_adapted(self.adapters) else self._binary(x, other, "mul")

    def _unary(self, x: Tensor, operation: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, operation, [], "")
        return out

    def _binary(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, operation)
        return out


@dataclass(frozen=True, slots=True)
class PackedGate:
    """GatedProduct by oneDNN."""

    gate: PackedProduct
    up: PackedProduct

    def __call__(self, x: Tensor) -> Tensor:
        """See `products`."""
        return self.up.times(x, self.gate.silu(x))


def side_by_side(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of linear layers as one; all of them have a bias or none has.

    The weight of a single layer is not copied.
    """
    weights = [linear.weight.detach() for linear in linears]
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return weights[0] if len(weights) == 1 else torch.cat(weights), torch.cat(biases) if biases else None


def is_adapted(adapters: AdaptedProduct | None) -> bool:
    """Whether a token of the step has an adapter."""
    return adapters is not None and adapters.is_active


def add_adapted(out: Tensor, x: Tensor, adapters: AdaptedProduct | None) -> Tensor:
    """`out`, with the adapters' share for the inputs `x` added in place."""
    if adapters is not None and adapters.is_active:
        adapters.add_to(out, x)
    return out
