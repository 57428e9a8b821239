"""GraphedModel: a PagedModel whose steps are replayed as CUDA graphs where their shapes are captured."""

import logging
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.backends.cuda.graphs import BYTES_PER_GRAPH, WORKSPACE_BYTES
from cllm_core.backends.cuda.static_steps import Buckets, Capture, NotCapturable, StaticSteps
from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.step_tables import AttentionByTables
from cllm_core.info import ComputePath, ComputePaths
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.paged import LayerSpec, RowSpan

# Steps without a new graph after one that the memory did not suffice for.
_PAUSED_STEPS = 256

logger = logging.getLogger(__name__)


class GraphedModel(PagedModel):
    """See PagedModel. Each shape is captured when it is first met; steps with adapters run without graphs.

    Args:
        model, layers, paths, adapters: as in PagedModel.
        attention: over tables, which graphs find where they looked for them.
        capture: makes the graphs.
        buckets: the shapes of steps that are captured.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[LayerSpec],
        attention: AttentionByTables,
        paths: ComputePaths,
        *,
        capture: Capture,
        buckets: Buckets,
        adapters: AdapterBank | None = None,
    ) -> None:
        super().__init__(model, layers, attention, paths, adapters=adapters)
        self._tables_attention, self._capture, self._buckets = attention, capture, buckets
        self._static: StaticSteps | None = None
        self._num_paused = 0  # steps until the next capture may be tried

    @property
    def num_graphs(self) -> int:
        """See PagedModel."""
        return 0 if self._static is None else self._static.num_graphs

    @property
    def may_capture(self) -> bool:
        """See PagedModel."""
        return self._static is not None and self._static.num_graphs < self._buckets.count

    @property
    def max_graph_tokens(self) -> int:
        """See PagedModel."""
        return self._buckets.max_tokens

    def reserved_bytes(self, *, block_size: int, max_model_len: int) -> int:
        """See PagedModel."""
        buffers = StaticSteps.num_bytes(
            self._buckets, max_row_blocks=-(-max_model_len // block_size), vocab_size=self.vocab_size
        )
        graphs = self._buckets.count * BYTES_PER_GRAPH + WORKSPACE_BYTES
        return super().reserved_bytes(block_size=block_size, max_model_len=max_model_len) + buffers + graphs

    def free_cache(self) -> None:
        """See PagedModel."""
        super().free_cache()
        self._static = None

    def enable_graphs(self, *, max_model_len: int) -> None:
        """See PagedModel."""
        assert self._cache is not None
        self._static = StaticSteps(
            self._forward_pass,
            self._cache,
            self._tables_attention.attention,
            self._capture,
            buckets=self._buckets,
            max_row_blocks=-(-max_model_len // self._cache.block_size),
            vocab_size=self.vocab_size,
        )

    def _compute(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        static = None if self._adapters is not None and self._adapters.step.groups else self._static
        shape = None if static is None else static.shape_of(rows)
        self._num_paused = max(0, self._num_paused - 1)
        if static is not None and shape is not None and (static.has_captured(shape) or not self._num_paused):
            try:
                return static.run(shape, input_ids, positions, rows, sampled)
            except torch.OutOfMemoryError as error:
                if static.has_captured(shape):
                    raise
                logger.warning("no memory to capture a CUDA graph, which is tried again later: %s", error)
                self._num_paused = _PAUSED_STEPS
            except NotCapturable as reason:
                logger.warning("steps run without CUDA graphs from now on: %s", reason)
                self._static = None
                self.paths = msgspec.structs.replace(self.paths, graphs=ComputePath("none", str(reason)))
        return super()._compute(input_ids, positions, rows, sampled)
