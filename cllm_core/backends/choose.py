"""Which backend prepares a model on this machine: the one place that decides it and says why."""

import logging

import torch
from transformers import PreTrainedModel

from cllm_core.backends.base import Backend
from cllm_core.backends.cpu.backend import CpuBackend
from cllm_core.backends.cpu.coverage import NO_KERNELS
from cllm_core.backends.cpu.kernels import Kernels
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
from cllm_core.models.placement import choose_device, has_bfloat16

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
        config: its dtype, kernels, quantization, graphs, cache blocks and limits are used.
        model: on its device.
    """
    if config.tensor_parallel_size > 1:
        return _divided_backend(model)
    quantizes = config.quantization is not None
    if model.device.type == "cuda":
        buckets = Buckets.of(max_rows=config.max_num_seqs, max_tokens=config.max_batched_tokens)
        return CudaBackend(buckets if config.cuda_graphs else None, quantizes=quantizes)
    if model.dtype != torch.bfloat16:
        dtype = str(model.dtype).removeprefix("torch.")
        return TorchBackend(f"{dtype} is computed as transformers does", quantizes=quantizes)
    kernels = _kernels(config)
    no_onednn = onednn_gap(model)
    if kernels is None and no_onednn is not None:
        return TorchBackend(no_onednn, quantizes=quantizes)
    return CpuBackend(
        kernels,
        block_size=config.cache_block_size,
        quantization=config.quantization,
        no_kernels=NO_KERNELS if config.native_kernels else "native_kernels is off",
        packs=no_onednn is None,
        widens=config.dtype == "auto" and not has_bfloat16(model.device),
    )


def _divided_backend(model: PreTrainedModel) -> Backend:
    """For a model that transformers has divided: it computes the layers, as their weights are not whole."""
    reason = "the model is divided among devices"
    if model.device.type == "cuda":
        return CudaBackend(None, keeps_layers=reason)
    return TorchBackend(reason)


def kernels_take_bfloat16(config: EngineConfig) -> bool:
    """Whether a bfloat16 model will have C kernels, which compute it on processors without bfloat16 too.

    Raises:
        ConfigError: the processor lacks the instruction set that the settings ask for.
        ModelLoadError: CUDA is asked for and there is none.
    """
    if config.tensor_parallel_size > 1 or choose_device(config.device).type != "cpu":
        return False
    return _kernels(config) is not None


def _kernels(config: EngineConfig) -> Kernels | None:
    return load_kernels(cache_folder(), config.cpu_isa) if config.native_kernels else None
