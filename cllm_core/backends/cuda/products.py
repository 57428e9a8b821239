"""The matrix products of a fused decoder layer on a CUDA device: torch's own, with fewer kernels around them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cllm_core.backends.cuda.layer_kernels import LayerKernels
from cllm_core.backends.products import Product, add_adapted, side_by_side
from cllm_core.models.adapter_bank import AdaptedProduct


@dataclass(frozen=True, slots=True)
class PlainProduct:
    """Product (see `products`) with the weights as they are."""

    weight: Tensor
    bias: Tensor | None
    adapters: AdaptedProduct | None

    @classmethod
    def of(cls, linears: Sequence[nn.Linear], adapters: AdaptedProduct | None) -> "PlainProduct":
        """These linear layers side by side."""
        return cls(*side_by_side(linears), adapters)

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
class PlainGate:
    """GatedProduct by one product for both layers; that of few tokens is read from memory faster than two halves."""

    both: Product
    kernels: LayerKernels | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """See GatedProduct."""
        both = self.both(x)
        if self.kernels is not None:
            return self.kernels.gate(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
