"""Copies between the host and a device that the host does not wait for, or not yet."""

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


class HostCopy:
    """A tensor on its way to the host: the device goes on behind it, and the host until it needs the values.

    Args:
        tensor: must not be written to later, since on a CPU nothing is copied.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.to("cpu", non_blocking=True)  # to pinned memory, which torch keeps until it is there
        self._arrival = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def wait(self) -> np.ndarray:
        """Its values. Waits for what was given to the device before the copy, not for what came after it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values.numpy()
