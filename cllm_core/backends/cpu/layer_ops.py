"""KernelOps: the parts of fused layers by the C kernels, for a bfloat16 model. A weight lies in panels of PANEL
outputs, whose pairs of inputs are multiplied and added together, or, in 8 bits, whose fours.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cllm_core.backends.cpu.coverage import product_gap
from cllm_core.backends.cpu.kernels import LANES, Kernels
from cllm_core.backends.cpu.weights import PanelWeight
from cllm_core.backends.layer_ops import (
    GatedProduct,
    LayerOps,
    Norm,
    Product,
    Rope,
    add_adapted,
    norm_parameters,
    side_by_side,
)
from cllm_core.models.adapter_bank import AdaptedProduct, AdapterBank


class KernelOps(LayerOps):
    """Makes the parts of fused layers.

    Args:
        kernels: the compiled library.
        fallback: makes the products that the kernels do not cover.
        adapters: as in LayerOps.

    Attributes:
        kernels: the compiled library.
        gap: why the kernels do not compute some product asked for so far; None where they compute all.
    """

    def __init__(self, kernels: Kernels, fallback: LayerOps, adapters: AdapterBank | None = None) -> None:
        super().__init__(adapters)
        self.kernels, self._fallback = kernels, fallback
        self.gap: str | None = None

    def product(self, linears: Mapping[str, nn.Linear]) -> Product:
        """See LayerOps."""
        if not self._covers(linears.values()):
            return self._fallback.product(linears)
        return PanelProduct.of(linears.values(), self.kernels, self.adapted(*linears))

    def gated_product(self, gate: Mapping[str, nn.Linear], up: Mapping[str, nn.Linear]) -> GatedProduct:
        """See LayerOps."""
        (first,), (second,) = gate.values(), up.values()
        if not self._covers((first, second)):
            return self._fallback.gated_product(gate, up)
        return PanelGate.of(first, second, self.kernels, (self.adapted(*gate), self.adapted(*up)))

    def norm(self, module: nn.Module) -> Norm:
        """See LayerOps."""
        return KernelNorm(*norm_parameters(module), self.kernels)

    def rope(self) -> Rope:
        """See LayerOps."""
        return KernelRope(self.kernels)

    def _covers(self, linears: Iterable[nn.Linear]) -> bool:
        gap = product_gap(linears)
        self.gap = self.gap or gap
        return gap is None


@dataclass(frozen=True, slots=True)
class KernelNorm(Norm):
    """Norm by the kernels."""

    kernels: Kernels

    def __call__(self, x: Tensor) -> Tensor:
        """See Norm."""
        return self.kernels.rms_norm(x, self.weight, self.epsilon)


@dataclass(frozen=True, slots=True)
class KernelRope:
    """Rope by the kernels, in place."""

    kernels: Kernels

    def __call__(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See Rope."""
        self.kernels.apply_rope_(heads, cos, sin)
        return heads


@dataclass(frozen=True, slots=True)
class PanelProduct:
    """Product with a weight in panels."""

    weight: PanelWeight
    kernels: Kernels
    adapters: AdaptedProduct | None

    @classmethod
    def of(cls, linears: Iterable[nn.Linear], kernels: Kernels, adapters: AdaptedProduct | None) -> "PanelProduct":
        """These linear layers side by side."""
        return cls(PanelWeight.of(*side_by_side(linears)), kernels, adapters)

    def __call__(self, x: Tensor) -> Tensor:
        """See Product."""
        return add_adapted(self.kernels.linear(x, self.weight), x, self.adapters)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """See Product."""
        return self(x).add_(other)


@dataclass(frozen=True, slots=True)
class PanelGate:
    """GatedProduct: outputs of gate and up alternate in runs of LANES, so that one panel has both factors."""

    weight: PanelWeight
    kernels: Kernels
    gate_adapters: AdaptedProduct | None
    up_adapters: AdaptedProduct | None

    @classmethod
    def of(
        cls,
        gate: nn.Linear,
        up: nn.Linear,
        kernels: Kernels,
        adapters: tuple[AdaptedProduct | None, AdaptedProduct | None],
    ) -> "PanelGate":
        """Of two linear layers and what adapters add to each."""
        parts = [side_by_side([gate]), side_by_side([up])]
        weight = torch.stack([part.view(-1, LANES, part.shape[1]) for part, _ in parts], dim=1).flatten(0, 2)
        biases = [bias.view(-1, LANES) for _, bias in parts if bias is not None]
        bias = torch.stack(biases, dim=1).flatten() if biases else None
        return cls(PanelWeight.of(weight, bias), kernels, *adapters)

    def __call__(self, x: Tensor) -> Tensor:
        """See GatedProduct."""
        both = self.kernels.linear(x, self.weight).view(len(x), -1, 2, LANES)
        gate = add_adapted(both[:, :, 0].reshape(len(x), -1), x, self.gate_adapters)
        up = add_adapted(both[:, :, 1].reshape(len(x), -1), x, self.up_adapters)
        return F.silu(gate, inplace=True).mul_(up)
