"""Compiles the C kernels for this processor on first use, keeps the library in the user's cache, and calls it.

Nothing depends on them: without a compiler the same is computed by torch, with more and smaller operations.
"""

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from ctypes import Array, addressof, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cllm_core.backends.cpu.records import LayerRecord, StepRecord
from cllm_core.backends.cpu.weights import INT8_GROUP, PanelWeight

logger = logging.getLogger(__name__)

MAX_HEAD_SIZE = 256
HEAD_SIZE_UNIT = 16
LANES = 16

_SOURCES = sorted(Path(__file__).parent.glob("*.c"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 120
_FLAGS = [
    *("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-std=gnu11", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"),
]

# Multiplications of attention below which waking other threads costs more than they bring.
_WORTH_THREADS = 100_000

_INPUT_GROUP_BYTES = INT8_GROUP + 8  # numbers, scale and offset

Int64Array = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Kernels:
    """The compiled library. All tensors are bfloat16 where nothing else is said, on the CPU.

    Args:
        path: the shared library.

    Attributes:
        can_multiply: whether `logits`, `linear` and `decode` can be called; they take a processor with AVX512-BF16
            (which has AVX512-VNNI too).
        can_decode: whether `linear` and `decode` are the fastest choice too.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._rms_norm = library.cllm_rms_norm
        self._rms_norm.argtypes = [c_void_p, c_int64, c_void_p, c_float, c_int64, c_int64, c_void_p]
        self._rms_norm.restype = None
        self._rotate = library.cllm_rotate
        self._rotate.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64]
        self._rotate.restype = None
        self._attend = library.cllm_attend
        self._attend.argtypes = [
            *[c_void_p] * 7,
            *[c_int64] * 5,
            c_float,
            c_int64,
            c_void_p,
            c_int64,
            c_void_p,
            c_int,
            c_void_p,
        ]
        self._attend.restype = None
        self.can_multiply = bool(library.cllm_can_multiply())
        # With AMX tiles oneDNN computes prompts several times as fast.
        self.can_decode = self.can_multiply and not library.cllm_has_tiles()
        if self.can_multiply:
            self._linear = library.cllm_linear
            self._linear.argtypes = [c_void_p, c_void_p, c_int64, c_int, c_void_p, c_void_p]
            self._linear.restype = None
            self._decode = library.cllm_decode
            self._decode.argtypes = [c_void_p, c_int64, c_void_p, c_int, c_void_p, c_void_p, c_void_p]
            self._decode.restype = None
            self._logits = library.cllm_logits
            self._logits.argtypes = self._linear.argtypes
            self._logits.restype = None

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """[..., H] over its root mean square times weight [H]; the result is contiguous."""
        size = weight.shape[0]
        x = x.contiguous()
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), size, weight.data_ptr(), epsilon, x.numel() // size, size, out.data_ptr())
        return out

    def rotate_(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """In place: heads * cos + rotate_half(heads) * sin.

        Args:
            heads: [T, H, D], the heads of a token side by side.
            cos, sin: [..., T, D], contiguous.
        """
        num_tokens, num_heads, size = heads.shape
        assert heads.stride()[1:] == (size, 1)
        self._rotate(heads.data_ptr(), heads.stride(0), cos.data_ptr(), sin.data_ptr(), num_tokens, num_heads, size)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cache: tuple[Tensor, Tensor],
        step: "StepTables",
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Store the step's keys and values, attend from every row to its context.

        Args:
            query: [T, H, D].
            key, value: [T, H_kv, D].
            cache: keys and values of one layer, [num_blocks, block_size, H_kv, D] each; written.
            step: the step's rows.
            scale, window: as in PagedAttention.

        Returns:
            [T, H, D].
        """
        query, key, value = _beside(query), _beside(key), _beside(value)
        keys, values = cache
        num_tokens, num_heads, size = query.shape
        strides = (c_int64 * 3)(query.stride(0), key.stride(0), value.stride(0))
        out = query.new_empty(query.shape)
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
            scale,
            window or 0,
            step.rows_address,
            step.num_rows,
            step.block_ids_address,
            torch.get_num_threads() if is_large else 1,
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
        x, record, threads = x.contiguous(), weight.record, torch.get_num_threads()
        out = torch.empty((len(x), weight.num_out), dtype=dtype)
        room = int8_inputs(len(x), weight.num_in if weight.is_int8 else 0)
        function(addressof(record), x.data_ptr(), len(x), threads, room.data_ptr(), out.data_ptr())
        return out

    def decode(
        self,
        layers: Array[LayerRecord],
        step: StepRecord,
        residual: Tensor,
        buffers: Sequence[Tensor],
        room: Tensor,
    ) -> None:
        """Run decoder layers, in place, and write the KV cache.

        Args:
            layers: in their order.
            step: rows, cache and rotary factors.
            residual: [T, H] float32, contiguous: embeddings of the tokens, then what the layers make of them.
            buffers: room for what is in between: [T, H], [T, qkv], [T, num_heads * D], [T, intermediate size].
            room: `int8_inputs` for the widest product with a weight of 8 bits.
        """
        addresses = (c_void_p * len(buffers))(*(buffer.data_ptr() for buffer in buffers))
        self._decode(
            addressof(layers),
            len(layers),
            addressof(step),
            torch.get_num_threads(),
            residual.data_ptr(),
            addresses,
            room.data_ptr(),
        )


def int8_inputs(num_tokens: int, num_in: int) -> Tensor:
    """Room for the inputs of a product with a weight of 8 bits: uint8, of what the kernels call input_group."""
    return torch.empty((num_tokens, num_in // INT8_GROUP, _INPUT_GROUP_BYTES), dtype=torch.uint8)


class StepTables:
    """A step's rows as the kernels read them.

    Args:
        slots: [T], cache slot (block * block_size + offset) of each of the step's tokens.
        rows: [R, 4], per row: index of its first token, number of tokens, position of the first, and where its blocks
            begin in block_ids.
        block_ids: the rows' blocks one after the other.
    """

    def __init__(self, slots: Int64Array, rows: Int64Array, block_ids: Int64Array) -> None:
        self._arrays = slots, rows, block_ids  # whose memory the addresses name
        self.num_rows = len(rows)
        self.slots_address, self.rows_address = slots.ctypes.data, rows.ctypes.data
        self.block_ids_address = block_ids.ctypes.data
        self.num_pairs = int((rows[:, 1] * (rows[:, 1] + rows[:, 2])).sum())  # of query and key, per head


def load_kernels(cache_folder: Path) -> Kernels | None:
    """The kernels, compiled now if `cache_folder` does not hold them; None where that is not possible, with a log."""
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        logger.info("no C compiler (%s): steps run without native kernels, which is slower", ", ".join(_COMPILERS))
        return None
    try:
        return Kernels(_compiled(compiler, cache_folder))
    except (OSError, subprocess.SubprocessError) as error:
        output = (
            error.stderr.decode(errors="replace")[-500:] if isinstance(error, subprocess.CalledProcessError) else ""
        )
        logger.warning("native kernels cannot be used, steps will be slower: %s %s", error, output)
        return None


def _compiled(compiler: str, cache_folder: Path) -> Path:
    tuning = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [compiler, *_FLAGS, tuning]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_SECONDS).stdout
    identity = [
        *(path.read_bytes() for path in (*_SOURCES, *_HEADERS)),
        version,
        " ".join(command).encode(),
        _processor_features(),
    ]
    library = cache_folder / f"kernels-{hashlib.sha256(b'|'.join(identity)).hexdigest()[:16]}.so"
    if not library.exists():
        cache_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder) as folder:
            built = Path(folder) / library.name
            subprocess.run(
                [*command, "-o", str(built), *map(str, _SOURCES)],
                capture_output=True,
                check=True,
                timeout=_COMPILE_SECONDS,
            )
            built.replace(library)  # at once, so that workers that start together cannot see half a library
        logger.info("compiled the native kernels with %s", compiler)
    return library


def _processor_features() -> bytes:
    """What `native` stands for; another processor that shares the cache folder must not run this one's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform().encode()
    names = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)})).encode()


def _beside(x: Tensor) -> Tensor:
    """[T, H, D] with the heads of a token side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
