"""GGUF files as other programs might have written them."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from cllm_core.models.gguf.file import GgufFile, StoredTensor, Value

_TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
}
_ARCHITECTURE = "general.architecture"


def edit_gguf(
    source: Path,
    target: Path,
    keys: Mapping[str, Value | None],
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write `source` anew as `target` with these keys and float32 tensors; None takes one away. Returns the target."""
    file = GgufFile(source)
    stored = dict(file.tensors)
    for name, array in (tensors or {}).items():
        stored.pop(name, None)
        if array is not None:
            data = array.astype(np.float32)
            stored[name] = StoredTensor(data.shape, gguf.GGMLQuantizationType.F32, data)
    values = {key: value for key, value in {**file.values, **keys}.items() if value is not None}
    return write_file(target, values, stored)


def write_file(path: Path, values: Mapping[str, Value], tensors: Mapping[str, StoredTensor]) -> Path:
    """Write a file with this content, and return its path."""
    writer = gguf.GGUFWriter(path, str(values.get(_ARCHITECTURE, "llama")))
    for key, value in values.items():
        if isinstance(value, list | np.ndarray):
            writer.add_array(key, [item if isinstance(item, str) else item.item() for item in value])
        elif key != _ARCHITECTURE:
            writer.add_key_value(key, value, _TYPES[type(value)])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
