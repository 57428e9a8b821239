"""LayerKernels: what lies between the matrix products of a fused decoder layer, by the Triton kernels of `kernels`.

A step of few tokens is as long as its kernels are many, since each has to start and to wait for the one before. These
do in one what takes torch five kernels and two.
"""

import importlib.util
import logging

import torch
from torch import Tensor

from cllm_core.backends.step_tables import CachePlaces

logger = logging.getLogger(__name__)

_GATE_BLOCK = 1024


class LayerKernels:
    """The kernels; they run on the device of what they are given."""

    def __init__(self) -> None:
        from cllm_core.backends.cuda import kernels  # noqa: PLC0415 - needs triton

        self._turn_and_store, self._gate = kernels.turn_and_store, kernels.gate

    def turn_and_store(
        self, query: Tensor, key: Tensor, value: Tensor, *, factors: tuple[Tensor, Tensor], places: CachePlaces
    ) -> Tensor:
        """Turn queries and keys by rotary embedding, and write keys and values to the cache.

        Rounds as `fused_layer.Rotation` does: in bfloat16 and float16 to the same bits, in float32 but for sums that
        one of the two computes with a single rounding.

        Args:
            query: [T, H, D]; the elements of a head lie side by side, heads and tokens need not.
            key, value: [T, H_kv, D], likewise.
            factors: cosines and sines, [1, T, D] each.
            places: of the layer; written. Where tokens share a slot, it holds one of them in the end.

        Returns:
            [T, H, D], the turned queries, contiguous.
        """
        num_tokens, num_heads, size = query.shape
        num_kv_heads = key.shape[1]
        repeat = num_heads // num_kv_heads
        cos, sin = factors
        turned = query.new_empty(query.shape)
        self._turn_and_store[(num_tokens, num_kv_heads)](
            query,
            key,
            value,
            cos.contiguous(),
            sin.contiguous(),
            places.slots,
            turned,
            places.keys,
            places.values,
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
        return turned

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


def load_layer_kernels(device: torch.device, dtype: torch.dtype) -> LayerKernels | None:
    """The kernels, where the device can run them on a model of this type; None elsewhere."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    kernels = LayerKernels()
    return kernels if all(can_run(kernels, each, device) for each in {dtype, torch.float32}) else None


def can_run(kernels: LayerKernels, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels compute one token; compiling them takes a C compiler, which may be missing.

    What they compute, `fusing` compares in float32 for every layer.
    """
    heads = torch.zeros(1, 3, 16, dtype=dtype, device=device)
    keys, values = torch.zeros(2, 1, 1, 16, dtype=dtype, device=device)
    places = CachePlaces(keys, values, torch.zeros(1, dtype=torch.int32, device=device))
    try:
        kernels.turn_and_store(*heads.split(1, dim=1), factors=(heads, heads), places=places)
        kernels.gate(heads[:, 0])
    except Exception as error:  # of the compiler, the driver, or Triton: whatever it is, there is another way
        logger.warning("layers run in more steps than they need: their kernels cannot be used: %s", error)
        return False
    return True


def _power_of_two(number: int) -> int:
    """The smallest that is not below a number."""
    return 1 << (number - 1).bit_length()
