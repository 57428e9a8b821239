"""KernelAttention: attention over tables by the Triton kernels of `kernels`.

Why kernels of our own, and in Triton: `torch.nn.attention.varlen.varlen_attn` of torch 2.11 takes no block tables; that
of torch 2.13 takes them in blocks of 256 tokens only, and where it splits a context it is wrong for rows of more than
one query token (pytorch/pytorch issue 194167). The flash-attn package has the same kernels. FlexAttention has to be
compiled again, for seconds, for every shape, and its tiles are no larger than a cache block. A kernel that takes blocks
of any size, packs the heads of a KV head and splits long contexts is some hundred lines of Triton, which all builds of
torch for CUDA on Linux bring along.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from cllm_core.backends.step_tables import StepShape, StepTables, TableAttention, pack_tables
from cllm_core.models.attention import ALIBI, SINKS, SOFTCAP, Scoring
from cllm_core.models.paged import LayerSpec, RowSpan

_MAX_HEAD_SIZE = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The smallest side of a matrix product in Triton.
_MIN_TILE = 16
_LARGE_TILE = 64
# Bytes of keys held at a time: with values beside them, twice for the pipeline, what every recent device can hold.
_TILE_BYTES = 16 * 1024
# Products of float32 are exact, so they run without tensor cores and take their factors from registers. Larger tiles
# do not fit there: of 64 rows by 32 keys of size 128, 7 KB a thread spill.
_FLOAT32_TILE_BYTES = 8 * 1024
_MAX_KEYS = 64
_MAX_SPLITS = 32
# Programs per multiprocessor that hide each other's waits.
_PROGRAMS_PER_PROCESSOR = 2
# Kernels are compiled for so many rows; more than this for the next power of two.
_MIN_MAX_ROWS = 64
_UNLIMITED_WINDOW = 2**30


def attention_gap(layers: Sequence[LayerSpec], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels do not compute the attention of these layers; None where they do.

    New features of attention belong in here until a kernel has them.
    """
    if device.type != "cuda":
        return f"the kernels are for CUDA, the model is on {device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing: install triton"
    if dtype not in _DTYPES:
        return f"the kernels do not compute in {dtype}"
    if any(ALIBI in spec.features for spec in layers):
        return f"the kernels have no {ALIBI}"
    largest = max(max(spec.key_size, spec.value_size) for spec in layers)
    if largest > _MAX_HEAD_SIZE:
        return f"heads of {largest}: the kernels take up to {_MAX_HEAD_SIZE}"
    return trial_error(KernelAttention.on(device), layers, dtype, device)


def trial_error(
    attention: TableAttention, layers: Sequence[LayerSpec], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why an attention does not compute a step of one token, None where it does; compiling it takes a C compiler."""
    shape = StepShape(1, 1)
    packed = pack_tables([RowSpan(0, 1, 0, (0,))], shape, block_size=_MIN_TILE, scratch_block=1)
    tables = StepTables.view(torch.from_numpy(packed).to(device), shape)
    try:
        for spec in set(layers):
            query = torch.zeros(1, spec.num_kv_heads, spec.key_size, dtype=dtype, device=device)
            keys = query.new_zeros(2, _MIN_TILE, spec.num_kv_heads, spec.key_size)
            values = query.new_zeros(2, _MIN_TILE, spec.num_kv_heads, spec.value_size)
            attention(query, keys, values, tables, _trial_scoring(spec, query))
    except Exception as error:  # of the compiler, the driver, or Triton: whatever it is, there is another way
        return f"the kernels cannot be used: {error}"
    return None


def _trial_scoring(spec: LayerSpec, query: Tensor) -> Scoring:
    """Of the kinds that the layer has."""
    return Scoring(
        scale=1.0,
        softcap=1.0 if SOFTCAP in spec.features else None,
        sinks=query.new_zeros(query.shape[1]) if SINKS in spec.features else None,
    )


class KernelAttention:
    """Attention over tables (TableAttention).

    Args:
        num_processors: multiprocessors of the device, to be kept busy.
    """

    def __init__(self, num_processors: int) -> None:
        from cllm_core.backends.cuda import kernels  # noqa: PLC0415 - needs triton

        self._attend, self._combine = kernels.attend, kernels.combine
        self._num_programs = _PROGRAMS_PER_PROCESSOR * num_processors

    @classmethod
    def on(cls, device: torch.device) -> "KernelAttention":
        """For a CUDA device."""
        return cls(torch.cuda.get_device_properties(device).multi_processor_count)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, tables: StepTables, scoring: Scoring) -> Tensor:
        """See TableAttention."""
        if query.stride(2) != 1:  # the kernel takes strides of tokens and heads alone
            query = query.contiguous()
        num_tokens, num_heads, key_size = query.shape
        num_kv_heads, value_size = values.shape[2:]
        repeat = num_heads // num_kv_heads
        is_float32 = query.dtype == torch.float32
        tile = tile_size(num_tokens, tables.num_rows, repeat, is_float32=is_float32)
        num_tiles = num_tokens // (tile // repeat) + tables.num_rows
        num_splits = self._num_splits(num_tiles * num_kv_heads)
        out = query.new_empty(num_tokens, num_heads, value_size)
        is_whole = num_splits == 1
        parts = out if is_whole else query.new_empty(*out.shape[:2], num_splits, value_size, dtype=torch.float32)
        maxima, sums = query.new_empty(2, num_tokens, num_heads, num_splits, dtype=torch.float32)
        padded_key = _power_of_two(max(key_size, _MIN_TILE))
        padded_value = _power_of_two(max(value_size, _MIN_TILE))
        self._attend[(num_tiles, num_kv_heads, num_splits)](
            query,
            keys,
            values,
            parts,
            maxima,
            sums,
            tables.query_starts,
            tables.context_lengths,
            tables.block_starts,
            tables.gaps,
            tables.block_ids,
            maxima if scoring.sinks is None else scoring.sinks.float().contiguous(),
            scoring.scale,
            scoring.softcap or 1.0,
            _UNLIMITED_WINDOW if scoring.window is None else scoring.window,
            tables.num_rows,
            num_splits,
            query.stride(0),
            query.stride(1),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            KEY_SIZE=key_size,
            VALUE_SIZE=value_size,
            PAGE=keys.shape[1],
            MAX_ROWS=_power_of_two(max(tables.num_rows, _MIN_MAX_ROWS)),
            BLOCK_M=tile,
            BLOCK_N=keys_per_tile(max(padded_key, padded_value), query.dtype),
            PADDED_KEY=padded_key,
            PADDED_VALUE=padded_value,
            IS_WHOLE=is_whole,
            HAS_SOFTCAP=scoring.softcap is not None,
            HAS_SINKS=scoring.sinks is not None,
            num_stages=2,
        )
        if not is_whole:
            self._reduce(parts, maxima, sums, out)
        return out

    def _reduce(self, parts: Tensor, maxima: Tensor, sums: Tensor, out: Tensor) -> None:
        """Write to `out` [T, H, D_v] what the splits found, parts [T, H, splits, D_v] and the others [T, H, splits]."""
        num_tokens, num_heads, num_splits, value_size = parts.shape
        self._combine[(num_tokens * num_heads,)](
            parts,
            maxima,
            sums,
            out,
            num_splits,
            VALUE_SIZE=value_size,
            PADDED_VALUE=_power_of_two(max(value_size, _MIN_TILE)),
            MAX_SPLITS=_MAX_SPLITS,
        )

    def _num_splits(self, num_programs: int) -> int:
        """Parts of each context: enough to busy the device, whatever the contexts' lengths, unknown to the host."""
        return max(1, min(self._num_programs // num_programs, _MAX_SPLITS))


def tile_size(num_tokens: int, num_rows: int, repeat: int, *, is_float32: bool) -> int:
    """Queries times heads of a tile: few where rows have few queries, lest matrix products idle, and in float32."""
    per_row = num_tokens // num_rows * repeat
    is_small = is_float32 or per_row <= _MIN_TILE
    return max(_MIN_TILE if is_small else _LARGE_TILE, _power_of_two(repeat))


def keys_per_tile(padded_size: int, dtype: torch.dtype) -> int:
    """Keys of a tile, of so many numbers each."""
    num_bytes = _FLOAT32_TILE_BYTES if dtype == torch.float32 else _TILE_BYTES
    return max(_MIN_TILE, min(num_bytes // (padded_size * dtype.itemsize), _MAX_KEYS))


def _power_of_two(number: int) -> int:
    """The smallest that is not below a number."""
    return 1 << (number - 1).bit_length()
