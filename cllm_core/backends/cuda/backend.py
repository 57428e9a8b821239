"""CudaBackend: fused layers, attention by Triton kernels over the paged cache, and steps as CUDA graphs."""

import logging

import torch
from transformers import PreTrainedModel

from cllm_core.backends.cuda.attention import KernelAttention, attention_gap
from cllm_core.backends.cuda.graphed_model import GraphedModel
from cllm_core.backends.cuda.graphs import GraphCapture
from cllm_core.backends.cuda.layer_kernels import CudaOps, LayerKernels, layer_kernels_gap
from cllm_core.backends.cuda.static_steps import Buckets
from cllm_core.backends.fusing import fuse_layers
from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.step_tables import AttentionByTables
from cllm_core.backends.torch_plain import GATHERED, TRANSFORMERS, GatheredAttention
from cllm_core.info import ComputePath, ComputePaths
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.probe import probe_layers

logger = logging.getLogger(__name__)

_NO_QUANTIZATION = "quantization is for CPUs, the model is on a CUDA device"


class CudaBackend:
    """Prepares models for CUDA devices.

    Args:
        buckets: shapes of the steps to capture as graphs; None: steps run without graphs.
        quantizes: whether quantization is wanted, which there is none of.
        keeps_layers: why transformers' own layers stay in place; None: they are fused.
    """

    def __init__(self, buckets: Buckets | None, *, quantizes: bool = False, keeps_layers: str | None = None) -> None:
        self._buckets, self._quantizes, self._keeps_layers = buckets, quantizes, keeps_layers

    def prepare(self, model: PreTrainedModel, adapters: AdapterBank | None = None) -> PagedModel:
        """See Backend."""
        layers = probe_layers(model)
        layers_path = ComputePath(TRANSFORMERS, self._keeps_layers)
        if self._keeps_layers is None:
            layers_path = _fuse(model, adapters)
        if adapters is not None:
            adapters.attach(model)
        no_attention = attention_gap(layers, model.dtype, model.device)
        paths = ComputePaths(
            backend=ComputePath("cuda"),
            attention=ComputePath("Triton kernels") if no_attention is None else ComputePath(GATHERED, no_attention),
            layers=layers_path,
            output_layer=ComputePath("torch"),
            quantization=ComputePath("none", _NO_QUANTIZATION if self._quantizes else None),
            graphs=self._graphs_path(no_attention),
        )
        if no_attention is not None:
            logger.warning("attention copies the cache in every step, which is slow: %s", no_attention)
            return PagedModel(model, layers, GatheredAttention(model.device), paths, adapters=adapters)
        attention = AttentionByTables(KernelAttention.on(model.device), model.device)
        if self._buckets is None:
            return PagedModel(model, layers, attention, paths, adapters=adapters)
        capture = GraphCapture(model.device)
        return GraphedModel(model, layers, attention, paths, capture=capture, buckets=self._buckets, adapters=adapters)

    def _graphs_path(self, no_attention: str | None) -> ComputePath:
        if self._buckets is None:
            return ComputePath("none")
        if no_attention is not None:
            return ComputePath("none", f"graphs take the kernels' attention: {no_attention}")
        return ComputePath(f"steps of up to {self._buckets.max_tokens} tokens, captured when first met")


def _fuse(model: PreTrainedModel, adapters: AdapterBank | None) -> ComputePath:
    """Replace the layers of a model in 16 bits; one in float32 stays comparable with transformers."""
    if model.dtype == torch.float32:
        return ComputePath(TRANSFORMERS, "a float32 model stays comparable with transformers")
    no_kernels = layer_kernels_gap(model.dtype, model.device)
    if no_kernels is not None:
        logger.warning("decoder layers run more kernels than they need: %s", no_kernels)
    fusion = fuse_layers(model, CudaOps(LayerKernels() if no_kernels is None else None, adapters))
    name = "torch and Triton kernels" if no_kernels is None else "torch"
    return ComputePath(f"{name}, {fusion}", no_kernels or fusion.gap)
