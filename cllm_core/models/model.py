"""PagedModel: a transformers causal language model that runs on the paged KV cache, as one call."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.attention import PagedAttention
from cllm_core.models.native.kernels import Kernels
from cllm_core.models.native.step import NativeStep, can_attend
from cllm_core.models.paged import KVCache, LayerProbe, LayerSpec, PagedStep, RowSpan

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


class PagedModel:
    """Runs one step of any decoder-only architecture.

    Args:
        model: loaded with attn_implementation="cllm_paged", in eval mode, on its device.

    Raises:
        ModelLoadError: the architecture has layers that the paged cache cannot hold.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.device = model.device
        self.dtype = model.dtype
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.layers = _probe_layers(model)
        self._cache: KVCache | None = None
        self._kernels: Kernels | None = None
        self._adapters: AdapterBank | None = None

    def use_kernels(self, kernels: Kernels | None) -> None:
        """Attend by these kernels where they cover the model's layers; None: by torch."""
        self._kernels = kernels if can_attend(self.layers, self.dtype, self.device) else None

    @property
    def attends_natively(self) -> bool:
        """Whether the kernels compute attention."""
        return self._kernels is not None

    def use_adapters(self, adapters: AdapterBank) -> None:
        """Tell this bank, which is attached to the model, whose tokens are in a step."""
        self._adapters = adapters

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache, all layers."""
        return sum(spec.num_bytes(self.dtype) for spec in self.layers)

    def allocate_cache(self, *, num_blocks: int, block_size: int) -> int:
        """Make the KV cache; returns its size in bytes."""
        self._cache = KVCache(
            self.layers, num_blocks=num_blocks, block_size=block_size, dtype=self.dtype, device=self.device
        )
        return self._cache.num_bytes

    def free_cache(self) -> None:
        """Give the cache's memory back."""
        self._cache = None

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        """Compute one step.

        Args:
            input_ids: [T] int64, tokens flattened over rows.
            positions: [T] int64, their positions in their texts.
            rows: how the tokens split into rows, where each row's cache is, and its adapter; the cache is written.
            sampled: [S] int64, flat indices of the tokens whose logits are wanted.

        Returns:
            [S, V] float32 logits.
        """
        assert self._cache is not None
        if self._adapters is not None:
            self._adapters.step.begin(rows, self.device)
        step: PagedAttention = (
            PagedStep(self._cache, rows, self.device)
            if self._kernels is None
            else NativeStep(self._kernels, self._cache, rows)
        )
        out = self._model(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=sampled,
            paged=step,
        )
        logits: Tensor = out.logits
        return logits[0].float()


def _probe_layers(model: PreTrainedModel) -> list[LayerSpec]:
    """Run one token through the model and note what each attention layer would store."""
    text_config = model.config.get_text_config()
    unknown = set(getattr(text_config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if unknown:
        raise ModelLoadError(f"{type(model).__name__} has layers of type {', '.join(sorted(unknown))}: not supported")
    probe = LayerProbe()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, position_ids=token, use_cache=False, paged=probe)
    num_layers = text_config.num_hidden_layers
    if sorted(probe.layers) != list(range(num_layers)):
        raise ModelLoadError(
            f"{type(model).__name__}: attention seen in {len(probe.layers)} of {num_layers} layers; "
            "only models whose every layer has attention with keys and values can run on the paged cache"
        )
    return [probe.layers[index] for index in range(num_layers)]
