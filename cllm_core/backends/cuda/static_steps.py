"""StaticSteps: steps padded to a few shapes, in static buffers, so that each shape can be captured as a graph once.

It fills the buffers and hands out the logits; how a shape's computation is replayed - as a CUDA graph, or by running it
again - is up to its Capture. What fits no bucket, the model computes at its own size.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cllm_core.backends.paged_model import ForwardPass
from cllm_core.backends.step_tables import StepShape, StepTables, TableAttention, TableStep, pack_tables
from cllm_core.models.paged import KVCache, RowSpan
from cllm_core.models.transfer import copy_into

# Close enough that padding costs little where time grows with the tokens, few enough to capture them all.
_TOKEN_COUNTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

MAX_STATIC_TOKENS = _TOKEN_COUNTS[-1]
"""Beyond, computing takes the device longer than launching takes the host."""

Work = Callable[[], None]


class NotCapturable(Exception):
    """The model's forward pass cannot be captured; the message tells why. Never leaves the backends."""


class Capture(Protocol):
    """Makes work that can be replayed without its host code."""

    def __call__(self, work: Work) -> Work:
        """Run `work`, which reads and writes memory that stays, and return what does the same again.

        Raises:
            NotCapturable: there is none; the work may have been done or not.
        """
        ...


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shapes that steps are padded to.

    Args:
        max_rows: rows of the largest.
        max_tokens: tokens of the largest, at least max_rows.
    """

    max_rows: int
    max_tokens: int

    @classmethod
    def of(cls, *, max_rows: int, max_tokens: int) -> "Buckets":
        """For an engine's limits; with more rows than tokens allow, only steps of fewer rows fit."""
        most = min(max_tokens, MAX_STATIC_TOKENS)
        return cls(min(max_rows, most), most)

    @property
    def rows(self) -> tuple[int, ...]:
        """Row counts: powers of two, and the largest."""
        powers = (2**exponent for exponent in range(self.max_rows.bit_length()))
        return tuple(sorted({*powers, self.max_rows}))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token counts."""
        return tuple(sorted({*(count for count in _TOKEN_COUNTS if count < self.max_tokens), self.max_tokens}))

    @property
    def largest(self) -> StepShape:
        """The largest shape: every step that fits any fits this one."""
        return StepShape(self.max_rows, self.max_tokens)

    @property
    def count(self) -> int:
        """Number of shapes."""
        return sum(tokens >= rows for rows in self.rows for tokens in self.tokens)

    def fit(self, num_rows: int, num_tokens: int) -> StepShape | None:
        """The smallest shape that a step fits; None where it fits none."""
        if num_rows > self.max_rows or num_tokens > self.max_tokens:
            return None
        rows = self.rows[bisect_left(self.rows, num_rows)]
        return StepShape(rows, self.tokens[bisect_left(self.tokens, max(rows, num_tokens))])


class StaticSteps:
    """Runs steps in static buffers.

    Args:
        forward: the model.
        cache: whose last block is the scratch block; no row may own it.
        attention: over tables.
        capture: how a shape's computation is replayed.
        buckets: shapes to pad to.
        max_row_blocks: cache blocks of the longest text.
        vocab_size: V.
    """

    def __init__(
        self,
        forward: ForwardPass,
        cache: KVCache,
        attention: TableAttention,
        capture: Capture,
        *,
        buckets: Buckets,
        max_row_blocks: int,
        vocab_size: int,
    ) -> None:
        self._forward, self._cache, self._attention, self._capture = forward, cache, attention, capture
        self._buckets = buckets
        device, num_tokens = cache.keys[0].device, buckets.max_tokens
        # Zeros: padding reads what an earlier step left here, so it has to be valid from the beginning.
        self._input_ids, self._positions, self._sampled = torch.zeros(3, num_tokens, dtype=torch.long, device=device)
        table_size = buckets.largest.table_size(buckets.max_rows * max_row_blocks)
        self._tables = torch.zeros(table_size, dtype=torch.int32, device=device)
        self._logits = torch.zeros(num_tokens, vocab_size, device=device)
        self._graphs: dict[StepShape, Work] = {}

    @staticmethod
    def num_bytes(buckets: Buckets, *, max_row_blocks: int, vocab_size: int) -> int:
        """Memory of the buffers."""
        table_size = buckets.largest.table_size(buckets.max_rows * max_row_blocks)
        return 4 * table_size + buckets.max_tokens * (3 * 8 + 4 * vocab_size)

    @property
    def num_graphs(self) -> int:
        """Shapes that have been captured so far."""
        return len(self._graphs)

    def shape_of(self, rows: Sequence[RowSpan]) -> StepShape | None:
        """The bucket of a step; None where it fits none."""
        return self._buckets.fit(len(rows), sum(row.num_tokens for row in rows))

    def has_captured(self, shape: StepShape) -> bool:
        """Whether there is a graph of this shape."""
        return shape in self._graphs

    def run(
        self, shape: StepShape, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor
    ) -> Tensor:
        """Compute a step; arguments and result as in PagedModel.forward, `shape` from `shape_of`.

        The logits are overwritten by the next step.
        """
        self.fill(shape, input_ids, positions, rows, sampled)
        replay = self._graphs.get(shape)
        if replay is None:
            self._graphs[shape] = self._capture(lambda: self.compute(shape))
        else:
            replay()
        return self._logits[: len(sampled)]

    def fill(
        self, shape: StepShape, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor
    ) -> None:
        """Put a step into the buffers."""
        cache = self._cache
        packed = pack_tables(rows, shape, block_size=cache.block_size, scratch_block=cache.num_blocks - 1)
        copy_into(self._tables[: len(packed)], packed)
        self._input_ids[: len(input_ids)] = input_ids
        self._positions[: len(positions)] = positions
        self._sampled[: len(sampled)] = sampled

    def compute(self, shape: StepShape) -> None:
        """Compute what the buffers hold, padded to `shape`; the only place that runs the model."""
        num_tokens = shape.num_tokens
        step = TableStep(self._cache, StepTables.view(self._tables, shape), self._attention)
        # An earlier, larger step may have left larger indices behind those of this one.
        sampled = self._sampled[:num_tokens].clamp(max=num_tokens - 1)
        logits = self._forward(self._input_ids[:num_tokens], self._positions[:num_tokens], sampled, step)
        self._logits[:num_tokens].copy_(logits)
