"""Copies from the host to a device that the host does not wait for."""

import numpy as np
import torch
from torch import Tensor


def to_device(host: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """The same values on the device; on the CPU the same memory.

    A copy from pageable memory would make the host wait; torch keeps the pinned memory until the copy is done.
    """
    table = torch.from_numpy(host) if isinstance(host, np.ndarray) else host
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def copy_into(target: Tensor, host: np.ndarray) -> None:
    """Overwrite `target`, of the shape of `host`, wherever it is."""
    table = torch.from_numpy(host)
    target.copy_(table.pin_memory() if target.is_cuda else table, non_blocking=True)
