"""The process group that the devices of a model form."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from cllm_core.config import EngineConfig
from cllm_core.errors import ConfigError
from cllm_core.models.placement import choose_device

# A rank that waits for its turn, as all do between requests, is not one that hangs; the worker's watchdog tells.
_TIMEOUT = timedelta(days=365)


def join_group(config: EngineConfig, *, rank: int, port: int) -> None:
    """Meet the other ranks at a port of this machine, and compute on the device of this rank from now on.

    Raises:
        ConfigError: there are fewer devices than ranks, or this process belongs to a group already.
    """
    size = config.tensor_parallel_size
    if dist.is_initialized():
        raise ConfigError(f"tensor_parallel_size={size}: this process has a model on several devices already")
    device = choose_device(config.device)
    if device.type == "cuda":
        if torch.cuda.device_count() < size:
            raise ConfigError(
                f"tensor_parallel_size={size}: there are {torch.cuda.device_count()} CUDA devices; lower it"
            )
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(config.num_threads or max(1, torch.get_num_threads() // size))
    # transformers finds its place by these.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )


def leave_group() -> None:
    """Belong to no group any more; no-op where this process does not."""
    if dist.is_initialized():
        dist.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
