"""Kernels: the C kernels for one instruction set, as calls on tensors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL, Array, addressof, c_float, c_int, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cllm_core.backends.cpu.records import BuffersRecord, DrawRecord, LayerRecord, LinearRecord, StepRecord
from cllm_core.backends.cpu.weights import PanelWeight
from cllm_core.models.attention import Scoring

if TYPE_CHECKING:
    from cllm_core.backends.cpu.adapters import StepShare

MAX_HEAD_SIZE = 256
HEAD_SIZE_UNIT = 16
LANES = 16

# Multiplications of attention below which waking other threads costs more than they bring.
_WORTH_THREADS = 100_000

_NORM_TYPES = [c_void_p, c_int64, c_void_p, c_float, c_int64, c_int64, c_void_p]
_ROPE_TYPES = [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64]
_ATTEND_TYPES = [
    *([c_void_p] * 7),
    *([c_int64] * 5),
    *(c_float, c_int64, c_float, c_void_p, c_void_p, c_int64, c_void_p, c_int, c_void_p),
]
_PRODUCT_TYPES = [c_void_p, c_void_p, c_int64, c_int, c_void_p, c_void_p]
_DECODE_TYPES = [c_void_p, c_int64, c_void_p, c_int, c_void_p]
_LARGEST_TYPES = [c_void_p, c_int64, c_int64, c_int64, c_int, c_void_p]

Int64Array = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Kernels:
    """All tensors are bfloat16 where nothing else is said, on the CPU.

    Args:
        library: the compiled library.
        isa: an instruction set that it has kernels for, and the processor too.
    """

    def __init__(self, library: CDLL, isa: str) -> None:
        self.isa = isa

        def function(name: str, argument_types: list[Any], result_type: Any = None) -> Callable[..., Any]:
            found = library[f"cllm_{isa}_{name}"]  # an object of our own: attributes are shared by all who ask
            found.argtypes, found.restype = argument_types, result_type
            return found

        self._rms_norm = function("rms_norm", _NORM_TYPES)
        self._apply_rope = function("apply_rope", _ROPE_TYPES)
        self._attend = function("attend", _ATTEND_TYPES)
        self._linear = function("linear", _PRODUCT_TYPES)
        self._logits = function("logits", _PRODUCT_TYPES)
        self._decode = function("decode", _DECODE_TYPES)
        self._scratch_bytes = function("scratch_bytes", [c_int64, c_int64, c_int64], c_int64)
        self._largest = function("largest", _LARGEST_TYPES)
        self._draw = function("draw", [c_void_p, c_int])
        self._draw_scratch_size = function("draw_scratch_size", [c_int64], c_int64)
        self._draw_scratch = torch.empty(0)  # kept: new memory would cost as much as a draw
        self._own_threads: int | None = None

    @property
    def num_threads(self) -> int:
        """Threads that the kernels use, the caller's among them: as many as torch may."""
        return self._own_threads or torch.get_num_threads()

    @contextmanager
    def serial_torch(self) -> Iterator[None]:
        """Let torch compute by one thread; the kernels keep theirs.

        For the small operations between kernels. OpenMP's threads wait for each other at the end of each operation on
        more than 32768 numbers: beside a program that keeps a core busy, it takes milliseconds instead of microseconds.
        """
        self._own_threads = before = self.num_threads
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            self._own_threads = None

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """[..., H] over its root mean square times weight [H]; the result is contiguous."""
        size = weight.shape[0]
        x = x.contiguous()
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), size, weight.data_ptr(), epsilon, x.numel() // size, size, out.data_ptr())
        return out

    def apply_rope_(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """In place: heads * cos + rotate_half(heads) * sin.

        Args:
            heads: [T, H, D], the heads of a token side by side.
            cos, sin: [..., T, D], contiguous.
        """
        num_tokens, num_heads, size = heads.shape
        assert heads.stride()[1:] == (size, 1)
        self._apply_rope(heads.data_ptr(), heads.stride(0), cos.data_ptr(), sin.data_ptr(), num_tokens, num_heads, size)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cache: tuple[Tensor, Tensor],
        step: "StepTables",
        scoring: Scoring,
    ) -> Tensor:
        """Store the step's keys and values, attend from every row to its context.

        Args:
            query: [T, H, D].
            key, value: [T, H_kv, D].
            cache: keys and values of one layer, [num_blocks, block_size, H_kv, D] each; written.
            step: the step's rows.
            scoring: as in PagedAttention.

        Returns:
            [T, H, D].
        """
        query, key, value = _beside(query), _beside(key), _beside(value)
        keys, values = cache
        num_tokens, num_heads, size = query.shape
        strides = (c_int64 * 3)(query.stride(0), key.stride(0), value.stride(0))
        out = query.new_empty(query.shape)
        sinks = None if scoring.sinks is None else scoring.sinks.float().contiguous()
        is_large = step.num_pairs * num_heads * size > _WORTH_THREADS
        self._attend(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            strides,
            keys.data_ptr(),
            values.data_ptr(),
            step.slots_address,
            num_tokens,
            keys.shape[1],
            num_heads,
            key.shape[1],
            size,
            scoring.scale,
            scoring.window or 0,
            scoring.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            step.rows_address,
            step.num_rows,
            step.block_ids_address,
            self.num_threads if is_large else 1,
            out.data_ptr(),
        )
        return out

    def linear(self, x: Tensor, weight: PanelWeight) -> Tensor:
        """x @ weight.T + bias: [T, in] -> [T, out]; each token's numbers are the same in any batch."""
        return self._product(self._linear, x, weight, torch.bfloat16)

    def logits(self, x: Tensor, weight: PanelWeight) -> Tensor:
        """`linear` with float32 results, which need no rounding."""
        return self._product(self._logits, x, weight, torch.float32)

    def _product(self, function: Callable[..., None], x: Tensor, weight: PanelWeight, dtype: torch.dtype) -> Tensor:
        x, record = x.contiguous(), weight.record
        out = torch.empty((len(x), weight.num_out), dtype=dtype)
        scratch = self._scratch(len(x), [record])
        function(addressof(record), x.data_ptr(), len(x), self.num_threads, scratch.data_ptr(), out.data_ptr())
        return out

    def decode(
        self, layers: Array[LayerRecord], step: StepRecord, residual: Tensor, share: "StepShare | None" = None
    ) -> None:
        """Run decoder layers, in place, and write the KV cache.

        Args:
            layers: in their order, alike.
            step: rows, cache and rotary factors.
            residual: [T, H] float32, contiguous: embeddings of the tokens, then what the layers make of them.
            share: of adapters in the step, None for none.
        """
        num_tokens, first = len(residual), layers[0]
        products = [first.qkv, first.out, first.gate_up, first.down]
        widths = [first.qkv.num_in, first.qkv.num_out, first.out.num_in, first.down.num_in]
        between = [torch.empty((num_tokens, width), dtype=torch.bfloat16) for width in widths]
        scratch = self._scratch(num_tokens, products)
        of_adapters: list[Tensor] = []
        if share is not None:
            step.adapted, step.num_adapters = addressof(share.groups), len(share.groups)
            step.adapted_places = share.places.data_ptr()
            of_adapters = self._buffers_of_adapters(share, products)
        buffers = BuffersRecord(*(buffer.data_ptr() for buffer in (residual, *between, scratch, *of_adapters)))
        self._decode(addressof(layers), len(layers), addressof(step), self.num_threads, addressof(buffers))

    def _buffers_of_adapters(self, share: "StepShare", products: Sequence[LinearRecord]) -> list[Tensor]:
        widest_in, widest_out = (max(getattr(p, name) for p in products) for name in ("num_in", "num_out"))
        widest = max(widest_in, share.most_rank)
        return [
            torch.empty((share.most_tokens, widest_in), dtype=torch.bfloat16),
            torch.empty((share.most_tokens, share.most_rank), dtype=torch.bfloat16),
            torch.empty(self._scratch_bytes(share.most_tokens, widest, 0), dtype=torch.uint8),
            torch.empty((share.num_tokens, widest_out)),
        ]

    def largest(self, logits: Tensor) -> Tensor:
        """Index of the largest logit of each row, the lowest of equal ones.

        Args:
            logits: [T, V] float32, rows contiguous.

        Returns:
            [T] int64.
        """
        assert logits.dtype == torch.float32
        assert logits.stride(1) == 1
        num_rows, vocab_size = logits.shape
        out = torch.empty(num_rows, dtype=torch.int64)
        self._largest(logits.data_ptr(), logits.stride(0), vocab_size, num_rows, self.num_threads, out.data_ptr())
        return out

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
        """Choose tokens at random (cllm_core.engine.sampling); a position's token is the same in any batch.

        One thread at a time may call it.

        Args:
            logits: [T, V] float32, rows contiguous.
            positions: [N] int64, of the logits.
            keys: [N, 2] int64, of the noise.
            temperature: [N] float32, > 0.
            top_k: [N] int64 >= 1; top_p, min_p: [N] float32. None is off for all.

        Returns:
            [N] int64.
        """
        assert logits.dtype == torch.float32
        assert logits.stride(1) == 1
        num_threads, vocab_size = self.num_threads, logits.shape[1]
        scratch_size = num_threads * self._draw_scratch_size(vocab_size)
        if len(self._draw_scratch) < scratch_size:
            self._draw_scratch = torch.empty(scratch_size)
        keys, out = keys.contiguous(), torch.empty_like(positions)
        truncations = (None if one is None else one.data_ptr() for one in (top_k, top_p, min_p))
        record = DrawRecord(
            *(logits.data_ptr(), logits.stride(0), vocab_size),
            *(positions.data_ptr(), keys.data_ptr(), temperature.data_ptr(), *truncations),
            *(len(positions), self._draw_scratch.data_ptr(), out.data_ptr()),
        )
        self._draw(addressof(record), num_threads)
        return out

    def _scratch(self, num_tokens: int, products: Sequence[LinearRecord]) -> Tensor:
        """Scratch buffer for the converted inputs of any of these products."""
        most = max(self._scratch_bytes(num_tokens, product.num_in, product.is_int8) for product in products)
        return torch.empty(most, dtype=torch.uint8)


class StepTables:
    """A step's rows as the kernels read them.

    Args:
        slots: [T], cache slot (block * block_size + offset) of each of the step's tokens.
        rows: [R, 5], per row: index of its first token, number of tokens, position of the first, where its blocks
            begin in block_ids, and its gap (RowSpan).
        block_ids: the rows' blocks one after the other.
    """

    def __init__(self, slots: Int64Array, rows: Int64Array, block_ids: Int64Array) -> None:
        self._arrays = slots, rows, block_ids  # whose memory the addresses name
        self.num_rows = len(rows)
        self.slots_address, self.rows_address = slots.ctypes.data, rows.ctypes.data
        self.block_ids_address = block_ids.ctypes.data
        self.num_pairs = int((rows[:, 1] * (rows[:, 1] + rows[:, 2])).sum())  # of query and key, per head


def _beside(x: Tensor) -> Tensor:
    """[T, H, D] with the heads of a token side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
