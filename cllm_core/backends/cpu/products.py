"""The matrix products of a fused decoder layer by our own kernels, for a bfloat16 model on a processor with
AVX512-BF16. A weight lies in panels of PANEL outputs, whose pairs of inputs one instruction multiplies and adds, or, in
8 bits, whose fours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cllm_core.backends.cpu.kernels import LANES, Kernels
from cllm_core.backends.cpu.weights import PANEL, PanelWeight
from cllm_core.backends.products import add_adapted, side_by_side
from cllm_core.models.adapter_bank import AdaptedProduct


@dataclass(frozen=True, slots=True)
class PanelProduct:
    """Product (see products.Product)."""

    weight: PanelWeight
    kernels: Kernels
    adapters: AdaptedProduct | None

    @classmethod
    def of(cls, linears: Sequence[nn.Linear], kernels: Kernels, adapters: AdaptedProduct | None) -> "PanelProduct":
        """These linear layers side by side."""
        return cls(PanelWeight.of(*side_by_side(linears)), kernels, adapters)

    def __call__(self, x: Tensor) -> Tensor:
        """See `products`."""
        return add_adapted(self.kernels.linear(x, self.weight), x, self.adapters)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """See Product."""
        return self(x).add_(other)


@dataclass(frozen=True, slots=True)
class PanelGate:
    """GatedProduct: outputs of gate and up lie in turns of LANES, so that one panel has both factors."""

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
        """See `products`."""
        both = self.kernels.linear(x, self.weight).view(len(x), -1, 2, LANES)
        gate = add_adapted(both[:, :, 0].reshape(len(x), -1), x, self.gate_adapters)
        up = add_adapted(both[:, :, 1].reshape(len(x), -1), x, self.up_adapters)
        return F.silu(gate, inplace=True).mul_(up)


def can_multiply(kernels: Kernels, linears: Sequence[nn.Linear]) -> bool:
    """Whether the kernels take these layers' weights, alone and side by side."""
    return kernels.can_decode and all(
        linear.weight.dtype == torch.bfloat16 and linear.in_features % 2 == 0 and linear.out_features % PANEL == 0
        for linear in linears
    )
