"""CpuBackend: a bfloat16 model by the C kernels where they cover it, by oneDNN or torch where they do not."""

import logging
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from cllm_core.backends.cpu.coverage import NO_KERNELS, attention_gap, int8_gap, product_gap
from cllm_core.backends.cpu.decoder import replace_decoder_layers
from cllm_core.backends.cpu.head import replace_output_layer
from cllm_core.backends.cpu.huge_pages import move_to_huge_pages
from cllm_core.backends.cpu.int8 import quantise_weights
from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.backends.cpu.layer_ops import KernelOps
from cllm_core.backends.cpu.onednn import OneDnnOps, leave_weights_file, pack_linear_layers
from cllm_core.backends.cpu.panels import panel_weights
from cllm_core.backends.cpu.step import NativeAttention
from cllm_core.backends.cpu.whole_model import prove_native_model
from cllm_core.backends.fusing import LayerProofs, fuse_layers, prove_layers
from cllm_core.backends.layer_ops import LayerOps
from cllm_core.backends.paged_model import ForwardPass, PagedModel, StepAttention
from cllm_core.backends.torch_plain import GATHERED, GatheredAttention, TorchBackend
from cllm_core.config import QuantizationName
from cllm_core.info import ComputePath, ComputePaths
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.paged import LayerSpec
from cllm_core.models.probe import probe_layers

logger = logging.getLogger(__name__)

_KERNELS = "C kernels"
_ONE_CALL = "C kernels, all in one call"


class CpuBackend:
    """Prepares bfloat16 models.

    Args:
        kernels: the compiled library; None: oneDNN and torch compute everything.
        block_size: of the KV cache, in tokens.
        quantization: of the weights, wanted; `PagedModel.paths` says whether it was possible.
        no_kernels: why there are no kernels, where there are none.
        packs: whether oneDNN computes what the kernels do not; else torch does.
        widens: turn a model into float32, for plain torch, unless the kernels compute all of its layers.
    """

    def __init__(
        self,
        kernels: Kernels | None,
        *,
        block_size: int,
        quantization: QuantizationName | None = None,
        no_kernels: str = NO_KERNELS,
        packs: bool = True,
        widens: bool = False,
    ) -> None:
        self._kernels, self._no_kernels = kernels, no_kernels
        self._block_size, self._quantization = block_size, quantization
        self._packs, self._widens = packs, widens

    def prepare(self, model: PreTrainedModel, adapters: AdapterBank | None = None) -> PagedModel:
        """See Backend."""
        layers = probe_layers(model)
        fallback = OneDnnOps(adapters) if self._packs else LayerOps(adapters)
        if self._kernels is None:
            prepared = self._without_kernels(model, layers, fallback, adapters)
        else:
            ops = KernelOps(self._kernels, fallback, adapters)
            proofs = prove_layers(model, ops)
            gap = proofs.gap or _layers_gap(model, proofs) or self._attention_gap(model, layers)
            if self._widens and gap is not None:
                return self._in_float32(model, gap, adapters)
            prepared = self._by_kernels(model, layers, ops, proofs, adapters)
        if self._packs:
            pack_linear_layers(model)
        leave_weights_file(model)
        if adapters is not None:
            adapters.attach(model)
        return prepared

    def _in_float32(self, model: PreTrainedModel, gap: str, adapters: AdapterBank | None) -> PagedModel:
        reason = f"{gap}; the rest would be slower in bfloat16 than in float32 on this processor"
        logger.info("dtype auto: %s is computed in float32: %s", type(model).__name__, reason)
        model.float()
        if adapters is not None:
            adapters.cast(torch.float32)
        return TorchBackend(reason, quantizes=self._quantization is not None).prepare(model, adapters)

    def _attention_gap(self, model: PreTrainedModel, layers: Sequence[LayerSpec]) -> str | None:
        return attention_gap(layers, model.dtype, block_size=self._block_size)

    @property
    def _others(self) -> str:
        """What computes the products that the kernels do not."""
        return "oneDNN" if self._packs else "torch"

    def _without_kernels(
        self, model: PreTrainedModel, layers: Sequence[LayerSpec], ops: LayerOps, adapters: AdapterBank | None
    ) -> PagedModel:
        fusion = fuse_layers(model, ops)
        paths = ComputePaths(
            backend=ComputePath("cpu"),
            attention=ComputePath(GATHERED, self._no_kernels),
            layers=ComputePath(f"{self._others}, {fusion}", self._no_kernels),
            output_layer=ComputePath(self._others, self._no_kernels),
            quantization=ComputePath("none", None if self._quantization is None else self._no_kernels),
        )
        return PagedModel(model, layers, GatheredAttention(model.device), paths, adapters=adapters)

    def _by_kernels(
        self,
        model: PreTrainedModel,
        layers: Sequence[LayerSpec],
        ops: KernelOps,
        proofs: LayerProofs,
        adapters: AdapterBank | None,
    ) -> PagedModel:
        fusion = fuse_layers(model, ops, proofs)
        no_attention = self._attention_gap(model, layers)
        no_output_layer = replace_output_layer(model, ops.kernels)
        no_int8 = fusion.gap or ops.gap or no_output_layer or int8_gap(panel_weights(model))
        saved_bytes = 0 if self._quantization is None or no_int8 else quantise_weights(model)
        move_to_huge_pages(model)
        attention: StepAttention = GatheredAttention(model.device)
        forward_pass: ForwardPass | None = None
        no_single_call = fusion.gap or ops.gap or no_attention
        if no_attention is None:
            attention = native = NativeAttention(ops.kernels)
            if replace_decoder_layers(model, ops.kernels):
                forward_pass = prove_native_model(model, native, layers)
            else:
                no_single_call = (
                    no_single_call or "the decoder layers differ in heads, sizes or RoPE, or have a softcap or sinks"
                )
        no_int8 = no_int8 or no_single_call
        layers_path = ComputePath(f"{_KERNELS if ops.gap is None else self._others}, {fusion}", no_single_call)
        paths = ComputePaths(
            backend=ComputePath(f"cpu, {ops.kernels.isa}"),
            attention=_path(_KERNELS, GATHERED, no_attention),
            layers=ComputePath(_ONE_CALL) if no_single_call is None else layers_path,
            output_layer=_path(_KERNELS, self._others, no_output_layer),
            quantization=ComputePath("none")
            if self._quantization is None
            else _path(self._quantization, "none", no_int8),
        )
        return PagedModel(
            model,
            layers,
            attention,
            paths,
            forward_pass=forward_pass,
            adapters=adapters,
            saved_bytes=saved_bytes,
            sampling=ops.kernels,
        )


def _layers_gap(model: PreTrainedModel, proofs: LayerProofs) -> str | None:
    """Why the kernels do not compute all products of the layers that can be fused."""
    modules = (module for name in proofs.calls for module in model.get_submodule(name).modules())
    return product_gap(module for module in modules if isinstance(module, nn.Linear))


def _path(name: str, fallback: str, gap: str | None) -> ComputePath:
    """The faster way where there is no gap."""
    return ComputePath(name) if gap is None else ComputePath(fallback, gap)
