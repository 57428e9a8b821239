"""PagedModel: a model that a backend prepared; it runs on the paged KV cache, a step as one call."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.info import ComputePaths
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.attention import PagedAttention
from cllm_core.models.forward import TransformersForward
from cllm_core.models.paged import KVCache, LayerSpec, RowSpan


class StepAttention(Protocol):
    """A backend's attention: begins each step over the paged cache.

    Attributes:
        num_scratch_blocks: of the cache, behind those of texts, for what padding stores.
    """

    num_scratch_blocks: int

    def begin(self, cache: KVCache, rows: Sequence[RowSpan]) -> PagedAttention:
        """The attention of one step, rows in the order of its flattened tokens."""
        ...


class ForwardPass(Protocol):
    """A model's forward pass over one step."""

    def __call__(self, input_ids: Tensor, positions: Tensor, sampled: Tensor, step: PagedAttention) -> Tensor:
        """[T], [T] and [S] int64 to the logits [S, V] of the tokens at the indices `sampled`."""
        ...


class SamplingKernels(Protocol):
    """Choose tokens as `cllm_core.engine.sampling` defines it but for the rounding of exponentials."""

    def largest(self, logits: Tensor) -> Tensor:
        """[T, V] float32 to [T] int64, the lowest of equal ones."""
        ...

    def draw(
        self,
        logits: Tensor,
        *,
        positions: Tensor,
        keys: Tensor,
        temperature: Tensor,
        top_k: Tensor | None,
        top_p: Tensor | None,
        min_p: Tensor | None,
    ) -> Tensor:
        """Logits [T, V] float32 to tokens [N] int64; the rest as in engine.sampling_batch.Draw."""
        ...


class ModelCalls(Protocol):
    """Is told of each call of a model before it is made, as the other devices that hold parts of it have to be."""

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """PagedModel.allocate_cache."""
        ...

    def free_cache(self) -> None:
        """PagedModel.free_cache."""
        ...

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> None:
        """PagedModel.forward."""
        ...

    def clear_blocks(self, block_ids: Sequence[int]) -> None:
        """PagedModel.clear_blocks."""
        ...


class PagedModel:
    """Allocates a KV cache and computes steps.

    Args:
        model: loaded with attn_implementation="cllm_paged"; its layers may have been replaced since.
        layers: what each layer stores, from `probe_layers`.
        attention: covers all layers.
        paths: what computes which part, and why.
        forward_pass: of the model; None: transformers' own.
        adapters: the bank that is attached to the model, None where there is none.
        saved_bytes: of weights, by quantization.
        sampling: chooses tokens by the logits; None: tensor code does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[LayerSpec],
        attention: StepAttention,
        paths: ComputePaths,
        *,
        forward_pass: ForwardPass | None = None,
        adapters: AdapterBank | None = None,
        saved_bytes: int = 0,
        sampling: SamplingKernels | None = None,
    ) -> None:
        self.causal_lm = model
        self.device, self.dtype = model.device, model.dtype
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.layers = list(layers)
        self.paths = paths
        self.saved_bytes = saved_bytes
        self.sampling = sampling
        self._attention = attention
        self._forward_pass = forward_pass or TransformersForward(model)
        self._adapters = adapters
        self._cache: KVCache | None = None
        self._followers: ModelCalls | None = None

    def lead(self, followers: ModelCalls) -> None:
        """Tell these of every call from now on."""
        self._followers = followers

    @property
    def num_graphs(self) -> int:
        """CUDA graphs captured so far."""
        return 0

    @property
    def may_capture(self) -> bool:
        """Whether the next step may take the time to capture another graph."""
        return False

    @property
    def max_graph_tokens(self) -> int:
        """Tokens of the largest step that is to be captured as a graph; 0 where none is."""
        return 0

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache, all layers."""
        return sum(spec.num_bytes(self.dtype) for spec in self.layers)

    def reserved_bytes(self, *, block_size: int, max_model_len: int) -> int:
        """Memory to leave free for scratch blocks, graphs and their buffers; the cache has blocks of `block_size`."""
        return self._attention.num_scratch_blocks * block_size * self.cache_bytes_per_token

    def allocate_cache(self, *, num_blocks: int, block_size: int) -> int:
        """Make the KV cache, of `num_blocks` for texts; returns its size in bytes."""
        if self._followers is not None:
            self._followers.allocate_cache(num_blocks, block_size)
        self._cache = KVCache(
            self.layers,
            num_blocks=num_blocks + self._attention.num_scratch_blocks,
            block_size=block_size,
            dtype=self.dtype,
            device=self.device,
        )
        return self._cache.num_bytes

    def free_cache(self) -> None:
        """Give the cache's memory back, and that of all that depends on it."""
        if self._followers is not None:
            self._followers.free_cache()
        self._cache = None

    def enable_graphs(self, *, max_model_len: int) -> None:
        """Run steps as CUDA graphs from now on, where the backend does; the cache is allocated.

        Args:
            max_model_len: longest text in tokens.
        """

    @torch.inference_mode()
    def clear_blocks(self, block_ids: Sequence[int]) -> None:
        """Zero blocks of the KV cache that hold values which are not finite.

        Masked slots are multiplied by 0, and so would turn whoever gets the blocks next into not-a-number too.
        """
        assert self._cache is not None
        if self._followers is not None:
            self._followers.clear_blocks(block_ids)
        index = torch.tensor(block_ids, device=self.device)
        for tensor in (*self._cache.keys, *self._cache.values):
            tensor.index_fill_(0, index, 0)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        """Compute one step.

        Args:
            input_ids: [T] int64, tokens flattened over rows.
            positions: [T] int64, their positions in their texts.
            rows: how the tokens split into rows, where each row's cache is, and its adapter; the cache is written.
            sampled: [S] int64, flat indices of the tokens whose logits are wanted.

        Returns:
            [S, V] float32 logits, valid until the next step.
        """
        if self._followers is not None:
            self._followers.forward(input_ids, positions, rows, sampled)
        if self._adapters is not None:
            self._adapters.step.begin(rows, self.device)
        return self._compute(input_ids, positions, rows, sampled)

    def _compute(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        assert self._cache is not None
        step = self._attention.begin(self._cache, rows)
        return self._forward_pass(input_ids, positions, sampled, step).float()
