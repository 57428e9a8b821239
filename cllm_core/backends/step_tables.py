"""The rows of a step as tables on the device, padded to a bucket: what an attention needs that walks block tables.

All tables of a step lie in one array of int32, so that one copy brings them to the device and a captured step finds
them where it looked for them. Padding is a row of its own behind the others: its tokens see nothing, and what they
store goes to a scratch block that no text owns.

::

    tokens of the bucket   | row 0 | row 1 ...   | padding       |
    rows of the tables       0       1             num_rows used   then rows without tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cllm_core.models.attention import Scoring
from cllm_core.models.paged import KVCache, RowSpan
from cllm_core.models.transfer import to_device

# int32 in 16 bytes: kernels are compiled for addresses that are multiples of 16.
_ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class StepShape:
    """Size of a step, padding included: rows, and tokens over all of them."""

    num_rows: int
    num_tokens: int

    @property
    def sections(self) -> tuple[slice, ...]:
        """Where the tables lie in the packed array, in their order; there is one row more, for the padding."""
        sizes = (self.num_rows + 2, *[self.num_rows + 1] * 3, self.num_tokens)
        starts = accumulate((_aligned(size) for size in sizes), initial=0)
        return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=False))

    def table_size(self, num_block_ids: int) -> int:
        """int32 values of all tables."""
        return _aligned(self.sections[-1].stop) + num_block_ids


@dataclass(frozen=True, slots=True)
class StepTables:
    """Views of the packed tables of a step of B rows, the one of the padding included, and T tokens; int32.

    Attributes:
        query_starts: [B + 1], index of each row's first token; the last is T.
        context_lengths: [B], tokens that the row's last token attends to, itself included; 0 for padding.
        block_starts: [B], where the row's cache blocks begin in block_ids.
        gaps: [B], slots between the tokens before the row and its own, see RowSpan.
        write_slots: [T], cache slot (block * block_size + offset) of each token.
        block_ids: cache blocks of all rows, one row after another.
    """

    query_starts: Tensor
    context_lengths: Tensor
    block_starts: Tensor
    gaps: Tensor
    write_slots: Tensor
    block_ids: Tensor

    @classmethod
    def view(cls, packed: Tensor, shape: StepShape) -> "StepTables":
        """Of an array that `pack_tables` made for this shape, or of memory that will hold such arrays."""
        starts, lengths, block_starts, gaps, slots = (packed[section] for section in shape.sections)
        return cls(starts, lengths, block_starts, gaps, slots, block_ids=packed[shape.table_size(0) :])

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.context_lengths)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.write_slots)


def pack_tables(
    rows: Sequence[RowSpan], shape: StepShape, *, block_size: int, scratch_block: int
) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The tables of a step, see StepTables.

    Args:
        rows: in the order of the step's flattened tokens; no more rows and tokens than `shape` has.
        shape: to pad to.
        block_size: of the cache, in tokens.
        scratch_block: takes what padding stores.
    """
    num_blocks = [-(-row.end_slot // block_size) for row in rows]
    packed = np.zeros(shape.table_size(sum(num_blocks)), dtype=np.int32)
    block_ids = packed[shape.table_size(0) :]
    used = (row.block_ids[:count] for row, count in zip(rows, num_blocks, strict=True))
    block_ids[:] = np.fromiter(chain.from_iterable(used), dtype=np.int32, count=len(block_ids))

    num_rows = len(rows)
    lengths = np.asarray([row.num_tokens for row in rows], dtype=np.int32)
    num_tokens = int(lengths.sum())
    query_starts, context_lengths, block_starts, gaps, slots = (packed[section] for section in shape.sections)
    query_starts[1 : num_rows + 1] = np.cumsum(lengths)
    query_starts[num_rows + 1 :] = shape.num_tokens
    context_lengths[:num_rows] = [row.context_length for row in rows]
    block_starts[:num_rows] = np.cumsum(num_blocks) - num_blocks
    gaps[:num_rows] = [row.gap for row in rows]

    # A token's slot in its text is its index plus what its row's first slot is ahead of the row's first index.
    ahead = context_lengths[:num_rows] + gaps[:num_rows] - query_starts[1 : num_rows + 1]
    text_slots = np.arange(num_tokens, dtype=np.int32) + np.repeat(ahead, lengths)
    blocks = block_ids[np.repeat(block_starts[:num_rows], lengths) + text_slots // block_size]
    slots[:num_tokens] = blocks * block_size + text_slots % block_size
    slots[num_tokens:] = scratch_block * block_size
    return packed


class TableAttention(Protocol):
    """Attention of a step's queries to the cached keys and values that its tables name."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, tables: StepTables, scoring: Scoring) -> Tensor:
        """Attend.

        Args:
            query: [T, H, D]; heads are contiguous, tokens need not be.
            keys: [num_blocks, block_size, H_kv, D], contiguous.
            values: [num_blocks, block_size, H_kv, D_v], contiguous.
            tables: of the step.
            scoring: of the layer.

        Returns:
            [T, H, D_v], of the query's type; 0 for padding.
        """
        ...


@dataclass(frozen=True, slots=True)
class CacheSlots:
    """Where one layer keeps the keys and values of a step's T tokens.

    Attributes:
        keys: [num_slots, H_kv, D], contiguous; the cache itself.
        values: [num_slots, H_kv, D_v], contiguous; the cache itself.
        slots: [T] int32; tokens of padding share one.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor


class AttentionByTables:
    """StepAttention over tables.

    Args:
        attention: of a step's queries.
        device: of the cache.
    """

    num_scratch_blocks = 1

    def __init__(self, attention: TableAttention, device: torch.device) -> None:
        self.attention = attention
        self._device = device

    def begin(self, cache: KVCache, rows: Sequence[RowSpan]) -> "TableStep":
        """See StepAttention."""
        shape = StepShape(len(rows), sum(row.num_tokens for row in rows))
        packed = pack_tables(rows, shape, block_size=cache.block_size, scratch_block=cache.num_blocks - 1)
        return TableStep(cache, StepTables.view(to_device(packed, self._device), shape), self.attention)


class TableStep:
    """Attention of one step (PagedAttention) by its tables."""

    def __init__(self, cache: KVCache, tables: StepTables, attention: TableAttention) -> None:
        self._cache, self._tables, self._attention = cache, tables, attention
        self._write_slots = tables.write_slots.long()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """See PagedAttention.attend."""
        slots = self.slots(layer)
        slots.keys.index_copy_(0, self._write_slots, key)
        slots.values.index_copy_(0, self._write_slots, value)
        return self.attend_stored(layer, query, scoring)

    def slots(self, layer: int) -> CacheSlots:
        """For whoever stores a layer's keys and values before `attend_stored`."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        return CacheSlots(keys.flatten(0, 1), values.flatten(0, 1), self._tables.write_slots)

    def attend_stored(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        """As `attend`, once the step's keys and values are in their slots."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        return self._attention(query, keys, values, self._tables, scoring)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
