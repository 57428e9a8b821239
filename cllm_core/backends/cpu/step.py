"""NativeStep: attention of one step by the C kernels, straight from the paged cache: no gathering, padding or masks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cllm_core.backends.cpu.kernels import HEAD_SIZE_UNIT, LANES, MAX_HEAD_SIZE, Kernels, StepTables
from cllm_core.models.paged import KVCache, LayerSpec, RowSpan, write_slots

Addresses = np.ndarray[tuple[int], np.dtype[np.uintp]]


def can_attend(layers: Sequence[LayerSpec], dtype: torch.dtype, device: torch.device, *, block_size: int) -> bool:
    """Whether the kernels cover these layers, with a cache of this block size."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and block_size % LANES == 0
        and all(
            spec.key_size == spec.value_size and spec.key_size <= MAX_HEAD_SIZE and spec.key_size % HEAD_SIZE_UNIT == 0
            for spec in layers
        )
    )


class NativeStep:
    """Attention of one step (PagedAttention).

    Args:
        kernels: the compiled library.
        cache: the KV cache; `can_attend` holds for it. Its keys are laid out anew (native/attention.c).
        rows: in the order of the step's flattened tokens.

    Attributes:
        tables: the rows as the kernels read them.
        block_size: of the cache, in tokens.
    """

    def __init__(self, kernels: Kernels, cache: KVCache, rows: Sequence[RowSpan]) -> None:
        self._kernels, self._cache = kernels, cache
        self.block_size = cache.block_size
        first_blocks = np.cumsum([0, *(len(row.block_ids) for row in rows)])
        self.tables = StepTables(
            slots=write_slots(rows, cache.block_size),
            rows=np.asarray(
                [
                    (row.first_index, row.num_tokens, row.first_position, first_block)
                    for row, first_block in zip(rows, first_blocks, strict=False)
                ],
                dtype=np.int64,
            ),
            block_ids=np.asarray([block for row in rows for block in row.block_ids], dtype=np.int64),
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """See PagedAttention.attend."""
        cache = self._cache.keys[layer], self._cache.values[layer]
        return self._kernels.attend(query, key, value, cache=cache, step=self.tables, scale=scale, window=window)

    def cache_addresses(self, layers: Sequence[int]) -> tuple[Addresses, Addresses]:
        """Where the keys and the values of these layers begin."""
        keys = [self._cache.keys[layer].data_ptr() for layer in layers]
        values = [self._cache.values[layer].data_ptr() for layer in layers]
        return np.asarray(keys, dtype=np.uintp), np.asarray(values, dtype=np.uintp)
