"""Linear layers with weights laid out once for the CPU's matrix kernels (oneDNN), instead of at every call.

The results are those of nn.Linear; only the time differs. bfloat16 on CPUs with bfloat16 instructions, where the gain
is; float32 stays as it is, so that it stays comparable bit for bit with plain transformers.
"""

import ctypes
import gc
import sys

import torch
from torch import Tensor, nn

# What the weight layout is tuned for; a Jacobi window of one request. The layout serves every other size too.
_TUNED_FOR_TOKENS = 16


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


def can_pack(model: nn.Module) -> bool:
    """Whether this processor has kernels that a packed layout helps, for the model's number format."""
    parameter = next(model.parameters())
    return (
        parameter.device.type == "cpu"
        and parameter.dtype == torch.bfloat16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


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
