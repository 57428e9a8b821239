"""Which steps are recorded as CUDA graphs, and the memory that takes."""

import logging

import torch

from cllm_core.backends.cuda.graphs import BYTES_PER_GRAPH, WORKSPACE_BYTES, GraphRecorder
from cllm_core.backends.cuda.static_steps import Buckets, StaticSteps
from cllm_core.backends.paged_model import PagedModel
from cllm_core.config import EngineConfig
from cllm_core.engine.sampling import drawing_bytes
from cllm_core.models.paged import RowSpan

logger = logging.getLogger(__name__)


def recorded_buckets(model: PagedModel, config: EngineConfig) -> Buckets | None:
    """The shapes to record; None where steps are not recorded at all."""
    if not config.cuda_graphs or model.device.type != "cuda" or not model.attends_by_tables:
        return None
    return Buckets.of(max_rows=config.max_num_seqs, max_tokens=config.max_batched_tokens)


def step_bytes(model: PagedModel, config: EngineConfig, max_model_len: int) -> int:
    """Memory that steps take on a CUDA device beyond weights and cache, recorded ones included."""
    # Sampling keeps a few more copies of the logits than the forward pass does; it draws from a part of them at a time.
    computing = 2 * activation_bytes(model, config.max_batched_tokens, config.cache_block_size, max_model_len)
    computing += drawing_bytes(config.max_batched_tokens, model.vocab_size)
    scratch = config.cache_block_size * model.cache_bytes_per_token
    buckets = recorded_buckets(model, config)
    if buckets is None:
        return computing + scratch
    buffers = StaticSteps.num_bytes(
        buckets, max_row_blocks=-(-max_model_len // config.cache_block_size), vocab_size=model.vocab_size
    )
    # Graphs compute in memory of their own, the same for all of them.
    computing += activation_bytes(model, buckets.max_tokens, config.cache_block_size, max_model_len)
    return computing + scratch + buffers + buckets.count * BYTES_PER_GRAPH + WORKSPACE_BYTES


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


def record_steps(model: PagedModel, config: EngineConfig, max_model_len: int) -> None:
    """Record steps from now on, each shape when it is first met; no-op where they are not recorded."""
    buckets = recorded_buckets(model, config)
    if buckets is None:
        return
    model.use_static_steps(GraphRecorder(model.device), buckets=buckets, max_model_len=max_model_len)
    logger.info("steps of up to %d tokens are recorded as CUDA graphs when first met", buckets.max_tokens)
