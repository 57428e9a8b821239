"""NativeStep: attention of one step by the C kernels, straight from the paged cache: no gathering, padding or masks."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from cllm_core.backends.cpu.kernels import Kernels, StepTables
from cllm_core.models.attention import Scoring
from cllm_core.models.paged import KVCache, RowSpan, write_slots

Addresses = np.ndarray[tuple[int], np.dtype[np.uintp]]


class NativeAttention:
    """StepAttention by the kernels.

    Args:
        kernels: the compiled library.
    """

    num_scratch_blocks = 0

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def begin(self, cache: KVCache, rows: Sequence[RowSpan]) -> "NativeStep":
        """See StepAttention."""
        return NativeStep(self._kernels, cache, rows)


class NativeStep:
    """Attention of one step (PagedAttention).

    Args:
        kernels: the compiled library.
        cache: the KV cache; there is no `attention_gap` for it. Its keys are laid out anew (attention.h).
        rows: in the order of the step's flattened tokens.

    Attributes:
        tables: the rows as the kernels read them.
        block_size: of the cache, in tokens.
    """

    def __init__(self, kernels: Kernels, cache: KVCache, rows: Sequence[RowSpan]) -> None:
        self._kernels, self._cache = kernels, cache
        self.block_size = cache.block_size
        first_blocks, block_ids = _place_blocks(rows)
        self.tables = StepTables(
            slots=write_slots(rows, cache.block_size),
            rows=np.asarray(
                [
                    (row.first_index, row.num_tokens, row.first_position, first_block, row.gap)
                    for row, first_block in zip(rows, first_blocks, strict=True)
                ],
                dtype=np.int64,
            ),
            block_ids=np.asarray(block_ids, dtype=np.int64),
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """See PagedAttention.attend."""
        cache = self._cache.keys[layer], self._cache.values[layer]
        return self._kernels.attend(query, key, value, cache=cache, step=self.tables, scoring=scoring)

    def cache_addresses(self, layers: Sequence[int]) -> tuple[Addresses, Addresses]:
        """Where the keys and the values of these layers begin."""
        keys = [self._cache.keys[layer].data_ptr() for layer in layers]
        values = [self._cache.values[layer].data_ptr() for layer in layers]
        return np.asarray(keys, dtype=np.uintp), np.asarray(values, dtype=np.uintp)


def _place_blocks(rows: Sequence[RowSpan]) -> tuple[list[int], list[int]]:
    """Where each row's blocks begin among those of all, and these; rows that hold the same tuple share."""
    place_of: dict[int, int] = {}
    first_blocks, block_ids = [], list[int]()
    for row in rows:
        first_blocks.append(place_of.setdefault(id(row.block_ids), len(block_ids)))
        if first_blocks[-1] == len(block_ids):
            block_ids += row.block_ids
    return first_blocks, block_ids
