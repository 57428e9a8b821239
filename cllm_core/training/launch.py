"""The processes of a `torchrun` launch, told by its environment; a command run without it is the only process."""

import os

import torch

from cllm_core.config import DeviceName


def rank() -> int:
    """Number of this process, 0 for the first."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process among those of its machine, 0 for the first."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def take_gpu(device: DeviceName) -> None:
    """Make the GPU of this process torch's current one, where a launch has GPUs and `device` lets it use them.

    Processes beyond the number of GPUs share them; so each takes the only one where the launcher shows it no other.
    """
    if "LOCAL_RANK" in os.environ and device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
