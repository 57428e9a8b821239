"""TorchBackend: transformers' own layers, and attention that gathers the cache. Right everywhere, fast nowhere."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from cllm_core.backends.paged_model import PagedModel
from cllm_core.info import ComputePath, ComputePaths
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.paged import KVCache, PagedStep, RowSpan
from cllm_core.models.probe import probe_layers

GATHERED = "torch, gathering the cache"
TRANSFORMERS = "transformers"
_NO_QUANTIZATION = "plain torch does not quantize"


class TorchBackend:
    """Prepares a model for any device.

    Args:
        reason: why no faster backend takes it; None where plain torch is asked for.
        quantizes: whether quantization is wanted, which there is none of.
    """

    def __init__(self, reason: str | None = None, *, quantizes: bool = False) -> None:
        self._reason, self._quantizes = reason, quantizes

    def prepare(self, model: PreTrainedModel, adapters: AdapterBank | None = None) -> PagedModel:
        """See Backend."""
        layers = probe_layers(model)
        if adapters is not None:
            adapters.attach(model)
        paths = ComputePaths(
            backend=ComputePath("torch", self._reason),
            attention=ComputePath(GATHERED, self._reason),
            layers=ComputePath(TRANSFORMERS, self._reason),
            output_layer=ComputePath(TRANSFORMERS, self._reason),
            quantization=ComputePath("none", (self._reason or _NO_QUANTIZATION) if self._quantizes else None),
        )
        return PagedModel(model, layers, GatheredAttention(model.device), paths, adapters=adapters)


class GatheredAttention:
    """StepAttention that copies each row's context out of the cache, in every layer of every step.

    Args:
        device: of the cache.
    """

    num_scratch_blocks = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self, cache: KVCache, rows: Sequence[RowSpan]) -> PagedStep:
        """See StepAttention."""
        return PagedStep(cache, rows, self._device)
