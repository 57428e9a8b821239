"""Weights of a GGUF file by transformers' names, decoded one at a time as they are loaded."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cllm_core.errors import ModelLoadError
from cllm_core.models.gguf.architectures import Architecture
from cllm_core.models.gguf.file import GgufFile, StoredTensor
from cllm_core.models.gguf.keys import first_of

_IN_FILE: Final = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>[a-z0-9_]+)\.(?P<kind>weight|bias)")
_IN_MODEL: Final = re.compile(r"(?:model\.layers\.(?P<layer>\d+)\.)?(?P<part>.+)\.(?P<kind>weight|bias)")


class LazyWeight:
    """Stands for a tensor in a state dict: indexing it decodes, as indexing a slice of a safetensors file reads.

    transformers takes weights so, one after the other, and casts and moves each; all of them decoded at once would need
    the memory of the whole model in float32.
    """

    def __init__(self, decode: Callable[[], Tensor]) -> None:
        """Decode nothing yet."""
        self._decode = decode

    def __getitem__(self, index: object) -> Tensor:
        return self._decode()


def lazy_weights(
    file: GgufFile, architecture: Architecture, config: PreTrainedConfig, dtype: torch.dtype
) -> Mapping[str, LazyWeight]:
    """Every weight of the file, by its name in transformers' model.

    Args:
        file: whose tensors are read.
        architecture: of the file.
        config: of the model.
        dtype: that quantised weights are decoded to; others keep their own.

    Raises:
        ModelLoadError: the file has tensors that the architecture does not know.
    """
    weights: dict[str, LazyWeight] = {}
    unknown = []
    for name, stored in file.tensors.items():
        if name in architecture.rope_tensors:
            continue  # part of the configuration
        new_name = name_in_model(architecture, name)
        if new_name is None:
            unknown.append(name)
        else:
            weights[new_name] = LazyWeight(
                functools.partial(_decode, stored, architecture, part_of(name), config, dtype)
            )
    if unknown:
        raise ModelLoadError(
            f"{file.path}: has tensors that {architecture.name} does not know ({first_of(unknown)}); they would be "
            "left out of the computation, so name the model in another format"
        )
    return weights


def _decode(
    stored: StoredTensor, architecture: Architecture, part: str, config: PreTrainedConfig, dtype: torch.dtype
) -> Tensor:
    return architecture.restored(part, stored.decode(dtype), config)


def name_in_model(architecture: Architecture, name: str) -> str | None:
    """transformers' name of a tensor of a file, None where the architecture has none."""
    match = _IN_FILE.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = match["layer"], match["part"], match["kind"]
    module = (architecture.top if layer is None else architecture.block).get(part)
    if module is None:
        return None
    return f"{module}.{kind}" if layer is None else f"model.layers.{int(layer)}.{module}.{kind}"


def name_in_file(architecture: Architecture, name: str) -> str | None:
    """llama.cpp's name of a weight of transformers' model, None where the architecture has none."""
    match = _IN_MODEL.fullmatch(name)
    if match is None:
        return None
    layer = match["layer"]
    modules = architecture.top if layer is None else architecture.block
    part = next((part for part, module in modules.items() if module == match["part"]), None)
    if part is None:
        return None
    return f"{part}.{match['kind']}" if layer is None else f"blk.{layer}.{part}.{match['kind']}"


def part_of(name: str) -> str:
    """llama.cpp's name of the module that a tensor of a file belongs to."""
    return name.split(".")[-2]
