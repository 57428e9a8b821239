"""The GGUF container: metadata and tensors of one file, or of one that is split into several.

The format is read here and not by the `gguf` library's reader, which takes seconds for a vocabulary of 262144 tokens.
The library decodes the tensors. What keys and names mean is not known here.
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from torch import Tensor

from cllm_core.errors import ModelLoadError

Value = str | int | float | bool | list[str] | np.ndarray

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
_STRING, _ARRAY, _BOOL = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL
_SCALARS: Final[Mapping[int, str]] = {
    gguf.GGUFValueType.UINT8: "<u1",
    gguf.GGUFValueType.INT8: "<i1",
    gguf.GGUFValueType.UINT16: "<u2",
    gguf.GGUFValueType.INT16: "<i2",
    gguf.GGUFValueType.UINT32: "<u4",
    gguf.GGUFValueType.INT32: "<i4",
    gguf.GGUFValueType.FLOAT32: "<f4",
    gguf.GGUFValueType.BOOL: "?",
    gguf.GGUFValueType.UINT64: "<u8",
    gguf.GGUFValueType.INT64: "<i8",
    gguf.GGUFValueType.FLOAT64: "<f8",
}
_DTYPES: Final[Mapping[gguf.GGMLQuantizationType, torch.dtype]] = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_MAX_DIMENSIONS: Final = 4
_VALUES_AT_ONCE: Final = 1 << 16  # decoded in float32, which thus stays in the processor's cache
_SPLIT_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies in the file.

    Attributes:
        shape: rows first, as torch has it; GGUF writes it the other way round.
        kind: number format or quantisation.
        data: uint8, [*shape[:-1], bytes of a row]; mapped from the file, read when it is used.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray

    @property
    def dtype(self) -> torch.dtype | None:
        """Number format of the stored values, None where they are quantised."""
        return _DTYPES.get(self.kind)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values: a copy in their own number format, or in `dtype` where they were quantised."""
        if self.dtype is not None:
            return torch.from_numpy(self.data.copy()).view(self.dtype).reshape(self.shape)
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        blocks = self.data.reshape(-1, block_bytes)
        values = torch.empty(len(blocks), block_values, dtype=dtype)
        step = _VALUES_AT_ONCE // block_values
        for start in range(0, len(blocks), step):
            # the library goes through sixteen rows at a time, so one long row is done in one go
            decoded = gguf.dequantize(blocks[start : start + step].reshape(1, -1), self.kind)
            values[start : start + step] = torch.from_numpy(decoded).reshape(-1, block_values)
        return values.reshape(self.shape)


class GgufFile:
    """Metadata and tensors of a model.

    Attributes:
        path: that was opened, for messages.
        values: metadata by key; arrays of text are lists, other arrays are numpy's.
        tensors: by name, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Read the header of the file, and of the others where the model is split into several.

        Raises:
            ModelLoadError: it is no GGUF file, of a version or byte order that is not read, damaged or incomplete.
        """
        self.path = path
        self.values, self.tensors = _read(path)
        count = int(self.values.get("split.count", 1))  # type: ignore[arg-type]
        for other in _other_parts(path, count):
            self.tensors |= _read(other)[1]
        expected = self.values.get("split.tensors.count", len(self.tensors))
        if len(self.tensors) != expected:
            raise ModelLoadError(f"{path}: its parts hold {len(self.tensors)} tensors of {expected}; fetch it again")


def is_later_part(path: Path) -> bool:
    """Whether the name is that of a part of a split model other than the first, which the others belong to."""
    name = _SPLIT_NAME.fullmatch(path.name)
    return name is not None and int(name["number"]) > 1


def _other_parts(path: Path, count: int) -> list[Path]:
    if count <= 1:
        return []
    name = _SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name["number"]) != 1 or int(name["count"]) != count:
        raise ModelLoadError(
            f"{path}: is a part of a model split into {count} files; name the one ending in "
            f"-00001-of-{count:05}.gguf, with the others beside it"
        )
    others = [path.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf") for number in range(2, count + 1)]
    for other in others:
        if not other.is_file():
            raise ModelLoadError(f"{path}: its part {other.name} is not beside it; fetch that, too")
    return others


def _read(path: Path) -> tuple[dict[str, Value], dict[str, StoredTensor]]:
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Header(path, content).read()
    except (OSError, ValueError, TypeError, ArithmeticError, struct.error, MemoryError) as error:
        raise ModelLoadError(f"{path}: no GGUF file, or a damaged one ({error}); fetch it again") from error


class _Header:
    """Walks through the header, which has no index: the place of each entry follows from those before it."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._offset = 0

    def read(self) -> tuple[dict[str, Value], dict[str, StoredTensor]]:
        self._check_version()
        num_tensors, num_keys = self._unpack("<QQ")
        values = {self._text(): self._value(self._unpack("<I")[0]) for _ in range(num_keys)}
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
        start = self._offset + -self._offset % int(alignment)  # type: ignore[arg-type]
        tensors = {name: self._tensor(name, start + offset, shape, kind) for name, shape, kind, offset in entries}
        if len(tensors) != num_tensors:
            raise ValueError("two tensors have the same name")
        return values, tensors

    def _check_version(self) -> None:
        if self._content[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._offset = len(_MAGIC)
        (version,) = self._unpack("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; read are {_VERSIONS} in little-endian byte order")

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._content, self._offset)
        self._offset += struct.calcsize(form)
        return values

    def _text(self) -> str:
        (length,) = self._unpack("<Q")
        return str(self._take(length), "utf-8")

    def _take(self, length: int) -> bytes:
        end = self._offset + length
        if end > len(self._content):
            raise ValueError(f"cut off at byte {len(self._content)}")
        taken = self._content[self._offset : end]
        self._offset = end
        return taken

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            item_kind, count = self._unpack("<IQ")
            return self._texts(count) if item_kind == _STRING else self._numbers(item_kind, count)
        value: Value = self._numbers(kind, 1)[0].item()
        return value

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _texts(self, count: int) -> list[str]:
        """As `_text`, without calls: vocabularies have hundreds of thousands."""
        content, offset = self._content, self._offset
        unpack_length = struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            (length,) = unpack_length(content, offset)
            offset += 8
            texts.append(str(content[offset : offset + length], "utf-8"))
            offset += length
        self._offset = offset
        return texts

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name = self._text()
        (num_dimensions,) = self._unpack("<I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {num_dimensions} dimensions")
        sizes = self._unpack(f"<{num_dimensions}Q")
        kind, offset = self._unpack("<IQ")
        return name, sizes[::-1], gguf.GGMLQuantizationType(kind), offset

    def _tensor(self, name: str, start: int, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> StoredTensor:
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        *rows, row = shape or (1,)
        if row % block_values:
            raise ValueError(f"rows of {name} hold {row} values, which {kind.name} cannot divide")
        stored = (*rows, row // block_values * block_bytes)
        size = math.prod(stored)
        if start + size > len(self._content):
            raise ValueError(f"cut off within {name}")
        data = np.frombuffer(self._content, np.uint8, size, start).reshape(stored)
        return StoredTensor(shape, kind, data)
