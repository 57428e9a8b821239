"""Which backend prepares a model on this machine: the one place that decides it and says why."""

import logging

from transformers import PreTrainedModel

from cllm_core.backends.base import Backend
from cllm_core.backends.cpu.backend import CpuBackend
from cllm_core.backends.cpu.coverage import NO_KERNELS
from cllm_core.backends.cpu.library import load_kernels
from cllm_core.backends.cpu.onednn import onednn_gap
from cllm_core.backends.cuda.backend import CudaBackend
from cllm_core.backends.cuda.static_steps import Buckets
from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.torch_plain import TorchBackend
from cllm_core.config import EngineConfig
from cllm_core.errors import ConfigError
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.embedded import cache_folder

logger = logging.getLogger(__name__)


def prepare_model(config: EngineConfig, model: PreTrainedModel, adapters: AdapterBank | None = None) -> PagedModel:
    """Prepare a loaded model by the backend that suits it and the machine best; logs which path each part takes.

    Raises:
        ConfigError: the quantization or the instruction set that the settings ask for is not possible.
        ModelLoadError: as Backend.prepare.
    """
    prepared = choose_backend(config, model).prepare(model, adapters)
    logger.info("%s: %s", type(model).__name__, prepared.paths)
    reason = prepared.paths.quantization.reason
    if config.quantization is not None and reason is not None:
        raise ConfigError(f"quantization={config.quantization!r}: {reason}; leave out quantization")
    return prepared


def choose_backend(config: EngineConfig, model: PreTrainedModel) -> Backend:
    """The backend for a model in memory.

    Args:
        config: its kernels, quantization, graphs, cache blocks and limits are used.
        model: on its device.
    """
    quantizes = config.quantization is not None
    if model.device.type == "cuda":
        buckets = Buckets.of(max_rows=config.max_num_seqs, max_tokens=config.max_batched_tokens)
        return CudaBackend(buckets if config.cuda_graphs else None, quantizes=quantizes)
    gap = onednn_gap(model)
    if gap is not None:
        return TorchBackend(gap, quantizes=quantizes)
    kernels = load_kernels(cache_folder(), config.cpu_isa) if config.native_kernels else None
    return CpuBackend(
        kernels,
        block_size=config.cache_block_size,
        quantization=config.quantization,
        no_kernels=NO_KERNELS if config.native_kernels else "native_kernels is off",
    )
