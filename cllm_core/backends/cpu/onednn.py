"""Matrix products by oneDNN with weights laid out once, instead of at every call: the CPU backend's fallback where our
own kernels do not multiply. The results are those of nn.Linear; only the time differs.

bfloat16 on CPUs with bfloat16 instructions, where the gain is; float32 stays as it is, so that it stays comparable bit
for bit with plain transformers.
"""

import ctypes
import gc
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cllm_core.backends.layer_ops import GatedProduct, LayerOps, Product, add_adapted, is_adapted, side_by_side
from cllm_core.models.adapter_bank import AdaptedProduct

# What the weight layout is tuned for; a Jacobi window of one request. The layout serves every other size too.
_TUNED_FOR_TOKENS = 16


class OneDnnOps(LayerOps):
    """Products with packed weights; all else by torch."""

    def product(self, linears: Mapping[str, nn.Linear]) -> Product:
        """See LayerOps."""
        return PackedProduct.of(linears.values(), self.adapted(*linears))

    def gated_product(self, gate: Mapping[str, nn.Linear], up: Mapping[str, nn.Linear]) -> GatedProduct:
        """See LayerOps."""
        first, second = (PackedProduct.of(part.values(), self.adapted(*part)) for part in (gate, up))
        return PackedGate(first, second)


@dataclass(frozen=True, slots=True)
class PackedProduct:
    """Product by oneDNN, which can do something to a result before it is written."""

    weight: Tensor
    bias: Tensor | None
    adapters: AdaptedProduct | None

    @classmethod
    def of(cls, linears: Iterable[nn.Linear], adapters: AdaptedProduct | None) -> "PackedProduct":
        """These linear layers side by side."""
        weight, bias = side_by_side(linears)
        return cls(pack_weight(weight), bias, adapters)

    def __call__(self, x: Tensor) -> Tensor:
        """See Product."""
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
        """See GatedProduct."""
        return self.up.times(x, self.gate.silu(x))


class PackedLinear(nn.Module):
    """Stands in for an nn.Linear whose weight it packs.

    Args:
        linear: bfloat16, on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = pack_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], both bfloat16."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


def pack_weight(weight: Tensor) -> Tensor:
    """A weight [out_features, in_features] in the layout of the kernels: opaque, for torch.ops.mkldnn alone."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TUNED_FOR_TOKENS)
    return packed


def onednn_gap(model: nn.Module) -> str | None:
    """Why packed products do not help this model on this processor; None where they do."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        return f"packed products are for CPUs, the model is on {parameter.device}"
    if parameter.dtype != torch.bfloat16:
        return f"{str(parameter.dtype).removeprefix('torch.')} is computed as transformers does"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 products for this processor"
    return None


def pack_linear_layers(model: nn.Module) -> None:
    """Replace every nn.Linear of the model, whose plain weights are given up (but for those tied to embeddings)."""
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, linear in linears:
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, PackedLinear(linear))


def leave_weights_file(model: nn.Module) -> None:
    """Copy the parameters that are left, so that the file they were read from needs not stay mapped as a whole."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    gc.collect()
    if sys.platform == "linux":
        # glibc keeps what loading has freed; other C libraries may not have the call
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
