"""How many blocks the KV cache gets: as configured, else from the memory that weights and steps leave free."""

from pathlib import Path

import psutil
import torch

from cllm_core.backends.paged_model import PagedModel
from cllm_core.config import EngineConfig
from cllm_core.engine.sampling import drawing_bytes
from cllm_core.errors import ConfigError
from cllm_core.models.paged import RowSpan

# On a CPU the cache shares memory with the page cache and other programs, so it takes a modest part of what is free.
CPU_CACHE_SHARE = 0.25

_GIB = 1024**3
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USAGE = Path("/sys/fs/cgroup/memory.current")
_CGROUP_STAT = Path("/sys/fs/cgroup/memory.stat")


def num_cache_blocks(
    config: EngineConfig,
    *,
    bytes_per_token: int,
    max_model_len: int,
    device: torch.device,
    step_bytes: int,
    reserved_bytes: int = 0,
) -> int:
    """Resolve the size of the KV cache, in blocks.

    Args:
        config: num_cache_blocks wins over cache_memory_gib, which wins over a share of free memory.
        bytes_per_token: of the cache, all layers.
        max_model_len: a cache for max_num_seqs texts of this many tokens is never exceeded by the automatic choice.
        device: where the cache will live.
        step_bytes: of steps beyond weights and cache (cuda), see the function of this name.
        reserved_bytes: to be left for what is loaded later.

    Raises:
        ConfigError: not even one text of the smallest useful length fits.
    """
    if config.num_cache_blocks is not None:
        return config.num_cache_blocks
    bytes_per_block = bytes_per_token * config.cache_block_size
    if config.cache_memory_gib is not None:
        blocks = int(config.cache_memory_gib * _GIB) // bytes_per_block
        source = f"cache_memory_gib={config.cache_memory_gib}"
    else:
        most_useful = config.max_num_seqs * -(-max_model_len // config.cache_block_size)
        free = _free_bytes(config, device, step_bytes + reserved_bytes)
        blocks = min(free // bytes_per_block, most_useful)
        source = "the free memory"
    if blocks < 1:
        raise ConfigError(
            f"{source} does not hold one cache block of {bytes_per_block} bytes: "
            "free memory, use a smaller model, or set cache_memory_gib"
        )
    return blocks


def step_bytes(model: PagedModel, config: EngineConfig, max_model_len: int) -> int:
    """Memory that steps take on a CUDA device beyond weights and cache, captured ones included.

    Args:
        model: without a cache yet.
        config: the token budget of a step, and the cache's block size.
        max_model_len: longest text in tokens.
    """
    block_size = config.cache_block_size
    # Sampling keeps a few more copies of the logits than the forward pass does; it draws from a part of them at a time.
    computing = 2 * activation_bytes(model, config.max_batched_tokens, block_size, max_model_len)
    computing += drawing_bytes(config.max_batched_tokens, model.vocab_size)
    if model.max_graph_tokens:
        # Graphs compute in memory of their own, the same for all of them.
        computing += activation_bytes(model, model.max_graph_tokens, block_size, max_model_len)
    return computing + model.reserved_bytes(block_size=block_size, max_model_len=max_model_len)


def activation_bytes(model: PagedModel, num_tokens: int, block_size: int, max_model_len: int) -> int:
    """Peak memory of a step beyond what is allocated now, measured by running one; the model has no cache yet."""
    num_blocks = -(-num_tokens // block_size)
    model.allocate_cache(num_blocks=num_blocks, block_size=block_size)
    span = RowSpan(0, num_tokens, 0, tuple(range(num_blocks)))
    index = torch.arange(num_tokens, device=model.device)
    positions = index % max_model_len  # a model may have learned no more of them
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    model.forward(torch.zeros_like(index), positions, [span], index)
    peak = torch.cuda.max_memory_allocated(model.device)
    model.free_cache()
    torch.cuda.empty_cache()
    return int(peak - before)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a step failed for want of memory; on the CPU, torch raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _free_bytes(config: EngineConfig, device: torch.device, other_bytes: int) -> int:
    """Memory for the cache, where something else will take `other_bytes`."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - config.gpu_memory_utilization) * total - other_bytes)
    return int(CPU_CACHE_SHARE * (_free_host_bytes() - other_bytes)) // config.tensor_parallel_size


def _free_host_bytes() -> int:
    """Memory that can be taken on the host; inside a container, what its limit leaves."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, usage = _CGROUP_LIMIT.read_text().strip(), int(_CGROUP_USAGE.read_text()) - _reclaimable_bytes()
    except OSError:  # no such control group
        return free
    return free if limit == "max" else min(free, int(limit) - usage)


def _reclaimable_bytes() -> int:
    """Page cache that counts as used, the checkpoint's files just read above all, but is given up when needed."""
    entries = dict(line.split() for line in _CGROUP_STAT.read_text().splitlines())
    return int(entries.get("inactive_file", 0))
