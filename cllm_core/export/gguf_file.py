"""A model as a GGUF file, in llama.cpp's layout.

What llama.cpp computes must be what transformers computes. Names and keys are those that GGUF files are read by
(`cllm_core.models.gguf`), and what is to be written must read back as the model's configuration. Where it does not, the
export is refused, with llama.cpp's own converter named, which knows more architectures.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.export.gguf_tokenizer import add_tokenizer
from cllm_core.export.merged import MergedModel
from cllm_core.models.checkpoint import quiet
from cllm_core.models.frequencies import same_rope
from cllm_core.models.gguf.architectures import Architecture, architecture_written_as
from cllm_core.models.gguf.file import Value
from cllm_core.models.gguf.keys import Keys
from cllm_core.models.gguf.source import Source
from cllm_core.models.gguf.weights import name_in_file, part_of
from cllm_core.models.sampling_defaults import GGUF_FIELDS, GGUF_PREFIX, read_sampling_defaults

_FILE_TYPES: Final = {
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
}
# Attributes that no forward pass depends on, or that are compared in another way.
_NOT_COMPARED: Final = frozenset(
    (
        *("model_type", "initializer_range", "pretraining_tp", "use_cache", "max_window_layers", "rope_parameters"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        *("attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout"),
    )
)


def write_gguf(merged: MergedModel, path: Path) -> None:
    """Write the model as one GGUF file.

    Args:
        merged: the model.
        path: of the file; does not exist.

    Raises:
        ModelLoadError: architecture, configuration or tokenizer are not among those that can be written.
    """
    model, config = merged.model, merged.model.config
    architecture = architecture_written_as(config)
    if architecture is None:
        raise unsupported(f"architecture {config.model_type}")
    weights = _named_weights(model, architecture)
    try:
        keys, factors = architecture.write(config)
    except ValueError as error:
        raise unsupported(str(error)) from error
    with quiet():
        _require_equal(_read_back(architecture, keys, weights, factors), config)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_name(Path(merged.source.name).name)
    writer.add_file_type(_FILE_TYPES[model.dtype][1])
    for key, value in keys.items():
        writer.add_key_value(f"{architecture.name}.{key}", value, _VALUE_TYPES[type(value)])
    _add_sampling_defaults(writer, merged)
    add_tokenizer(writer, merged)
    _write_tensors(writer, weights, factors, architecture, config)


_VALUE_TYPES: Final = {
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
}


def _add_sampling_defaults(writer: gguf.GGUFWriter, merged: MergedModel) -> None:
    """What the checkpoint says about sampling, except for the number of tokens, which GGUF has no key for."""
    stated = read_sampling_defaults(merged.source.checkpoint).values()
    for key, field in GGUF_FIELDS.items():
        if field in stated:
            writer.add_key_value(GGUF_PREFIX + key, stated[field], _VALUE_TYPES[type(stated[field])])


def unsupported(what: str) -> ModelLoadError:
    """The error for what cannot be written as GGUF here."""
    return ModelLoadError(
        f"{what}: cannot be written as GGUF; export as safetensors, and convert the folder with "
        "convert_hf_to_gguf.py of llama.cpp"
    )


def _named_weights(model: PreTrainedModel, architecture: Architecture) -> dict[str, Tensor]:
    """Every weight by its name in GGUF; a tied output head is left out, which is how GGUF says that it is tied."""
    weights = {}
    for name, parameter in model.named_parameters():  # names a tied weight once
        gguf_name = name_in_file(architecture, name)
        if gguf_name is None:
            raise unsupported(f"weight {name}")
        weights[gguf_name] = parameter.detach()
    return weights


def _read_back(
    architecture: Architecture, keys: Mapping[str, Value], weights: Mapping[str, Tensor], factors: Mapping[str, Tensor]
) -> PreTrainedConfig:
    """The configuration that a reader of the file will get."""
    prefix = f"{architecture.name}."
    named = {prefix + key: value for key, value in keys.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    path = Path(architecture.name)
    source = Source(path, Keys(path, named, prefix), shapes, factors)
    attributes = architecture.read(source)
    return architecture.config_class(**attributes | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))


def _require_equal(restored: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Raise ModelLoadError unless both compute the same; what one of them does not have must be off in the other."""
    general = set(PreTrainedConfig().to_dict()) - {"tie_word_embeddings"}
    for name in sorted(set(type(config)().to_dict()) - general - _NOT_COMPARED):
        value, other = getattr(config, name, None), getattr(restored, name, None)
        is_close = isinstance(value, float) and isinstance(other, float) and math.isclose(value, other, rel_tol=1e-6)
        if value != other and not is_close and (value or other):
            raise unsupported(f"{name} {value}")
    if not same_rope(restored, config):
        raise unsupported(f"rope_parameters {config.rope_parameters}")


def _write_tensors(
    writer: gguf.GGUFWriter,
    weights: Mapping[str, Tensor],
    factors: Mapping[str, Tensor],
    architecture: Architecture,
    config: PreTrainedConfig,
) -> None:
    """Header and metadata first, then one tensor after the other: no second copy of the model in memory."""
    named = [*factors.items(), *weights.items()]
    for name, tensor in named:
        array, kind = _stored(architecture.stored(part_of(name), tensor, config))
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for name, tensor in named:
            writer.write_tensor_data(_stored(architecture.stored(part_of(name), tensor, config))[0])
    finally:
        writer.close()


def _stored(tensor: Tensor) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """The tensor as it is written: vectors in float32, as llama.cpp wants; bfloat16, unknown to numpy, as bytes."""
    if tensor.ndim == 1:
        return tensor.float().numpy(), gguf.GGMLQuantizationType.F32
    values = tensor.contiguous()
    kind = _FILE_TYPES[values.dtype][0]
    return (values.view(torch.uint8) if values.dtype is torch.bfloat16 else values).numpy(), kind
