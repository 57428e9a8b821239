"""Where the weights go and in which precision: the meaning of `device` and `dtype` "auto"."""

import logging

import torch

from cllm_core.config import DeviceName, DTypeName
from cllm_core.errors import ModelLoadError

logger = logging.getLogger(__name__)

DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose_device(requested: DeviceName) -> torch.device:
    """The device to run on; auto takes CUDA where there is one.

    Raises:
        ModelLoadError: CUDA is asked for and there is none.
    """
    if requested == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if requested == "cuda":
        raise ModelLoadError(
            'device="cuda": torch sees no CUDA device; use device="cpu", or install a CUDA build of torch and a driver'
        )
    return torch.device("cpu")


def choose_dtype(
    requested: DTypeName, stored: torch.dtype | None, device: torch.device, *, kernels_take_bfloat16: bool = False
) -> torch.dtype:
    """Precision of weights and KV cache.

    Args:
        requested: auto keeps the checkpoint's where the device computes in it.
        stored: the checkpoint's; None is a quantised one, which any 16-bit format holds about as well.
        device: decides whether bfloat16 is native.
        kernels_take_bfloat16: whether kernels of our own compute it where it is not.
    """
    if requested != "auto":
        return DTYPES[requested]
    chosen = _nearest_native(stored, device, kernels_take_bfloat16=kernels_take_bfloat16)
    if chosen is not stored:
        logger.info("dtype auto: weights stored as %s are computed in %s on %s", stored or "quantised", chosen, device)
    return chosen


def _nearest_native(stored: torch.dtype | None, device: torch.device, *, kernels_take_bfloat16: bool) -> torch.dtype:
    if stored is torch.float16 and device.type == "cuda":
        return torch.float16
    if stored in {None, torch.float16, torch.bfloat16} and has_bfloat16(device):
        return torch.bfloat16
    if stored in {None, torch.bfloat16} and kernels_take_bfloat16:  # of float16 it would lose digits to no end
        return torch.bfloat16
    return torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
