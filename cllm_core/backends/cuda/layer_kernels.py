"""LayerKernels: what lies between the matrix products of a fused decoder layer, by the Triton kernels of `kernels`.

A step of few tokens is as long as its kernels are many, since each has to start and to wait for the one before. These
do in one what takes torch five kernels and two.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cllm_core.backends.layer_ops import GatedProduct, LayerOps, Product
from cllm_core.backends.step_tables import CacheSlots
from cllm_core.models.adapter_bank import AdapterBank

_GATE_BLOCK = 1024


class LayerKernels:
    """The kernels; they run on the device of what they are given."""

    def __init__(self) -> None:
        from cllm_core.backends.cuda import kernels  # noqa: PLC0415 - needs triton

        self._rope_and_store_kv, self._gate = kernels.rope_and_store_kv, kernels.gate

    def rope_and_store_kv(
        self, query: Tensor, key: Tensor, value: Tensor, *, factors: tuple[Tensor, Tensor], slots: CacheSlots
    ) -> Tensor:
        """Apply RoPE to queries and keys, and write keys and values to the cache (RopeStore).

        Rounds as `TorchRope` does: in bfloat16 and float16 to the same bits, in float32 but for sums that
        one of the two computes with a single rounding.

        Args:
            query: [T, H, D]; the elements of a head lie side by side, heads and tokens need not.
            key, value: [T, H_kv, D], likewise.
            factors: cosines and sines, [1, T, D] each.
            slots: of the layer; written. Where tokens share a slot, it holds one of them in the end.

        Returns:
            [T, H, D], the queries with RoPE applied, contiguous.
        """
        num_tokens, num_heads, size = query.shape
        num_kv_heads = key.shape[1]
        repeat = num_heads // num_kv_heads
        cos, sin = factors
        rotated = query.new_empty(query.shape)
        self._rope_and_store_kv[(num_tokens, num_kv_heads)](
            query,
            key,
            value,
            cos.contiguous(),
            sin.contiguous(),
            slots.slots,
            rotated,
            slots.keys,
            slots.values,
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            NUM_KV_HEADS=num_kv_heads,
            REPEAT=repeat,
            SIZE=size,
            PADDED_REPEAT=_power_of_two(repeat),
            PADDED_HALF=_power_of_two(size // 2),
            num_warps=1,
        )
        return rotated

    def gate(self, both: Tensor) -> Tensor:
        """silu of the first half of each row times the second, rounded as by torch.silu and torch.mul.

        Args:
            both: [T, 2 F], contiguous.

        Returns:
            [T, F].
        """
        size = both.shape[1] // 2
        out = both.new_empty(len(both), size)
        self._gate[(len(both), -(-size // _GATE_BLOCK))](both, out, SIZE=size, BLOCK=_GATE_BLOCK)
        return out


def layer_kernels_gap(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels do not compute the layers of a model of this type; None where they do."""
    if device.type != "cuda":
        return f"the kernels are for CUDA, the model is on {device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing: install triton"
    kernels = LayerKernels()
    errors = (trial_error(kernels, each, device) for each in {dtype, torch.float32})
    return next((error for error in errors if error is not None), None)


def trial_error(kernels: LayerKernels, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels do not compute one token; None where they do. Compiling them takes a C compiler.

    What they compute, `fusing` compares in float32 for every layer.
    """
    heads = torch.zeros(1, 3, 16, dtype=dtype, device=device)
    keys, values = torch.zeros(2, 1, 1, 16, dtype=dtype, device=device)
    slots = CacheSlots(keys, values, torch.zeros(1, dtype=torch.int32, device=device))
    try:
        kernels.rope_and_store_kv(*heads.split(1, dim=1), factors=(heads, heads), slots=slots)
        kernels.gate(heads[:, 0])
    except Exception as error:  # of the compiler, the driver, or Triton: whatever it is, there is another way
        return f"the kernels cannot be used: {error}"
    return None


class CudaOps(LayerOps):
    """Makes the parts of fused layers: products by torch, and the kernels between them.

    Args:
        kernels: None: torch computes all.
        adapters: as in LayerOps.
    """

    def __init__(self, kernels: LayerKernels | None, adapters: AdapterBank | None = None) -> None:
        super().__init__(adapters)
        self.rope_store = self._kernels = kernels

    def gated_product(self, gate: Mapping[str, nn.Linear], up: Mapping[str, nn.Linear]) -> GatedProduct:
        """See LayerOps."""
        if self._kernels is None:
            return super().gated_product(gate, up)
        return KernelGate(self.product({**gate, **up}), self._kernels)

    def in_float32(self) -> "CudaOps":
        """See LayerOps."""
        return CudaOps(self._kernels)


@dataclass(frozen=True, slots=True)
class KernelGate:
    """GatedProduct by one product for both layers and a kernel behind it."""

    both: Product
    kernels: LayerKernels

    def __call__(self, x: Tensor) -> Tensor:
        """See GatedProduct."""
        return self.kernels.gate(self.both(x))


def _power_of_two(number: int) -> int:
    """The smallest that is not below a number."""
    return 1 << (number - 1).bit_length()
