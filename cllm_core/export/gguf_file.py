"""A model of the Llama family as a GGUF file, in llama.cpp's layout.

What llama.cpp computes must be what transformers computes: a configuration that its `llama` architecture has no place
for is refused, with llama.cpp's own converter named, which knows more architectures.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.export.gguf_tokenizer import add_tokenizer
from cllm_core.export.merged import MergedModel

_FILE_TYPES = {
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
}


def write_gguf(merged: MergedModel, path: Path, scratch: Path) -> None:
    """Write the model as one GGUF file.

    Args:
        merged: the model.
        path: of the file; does not exist.
        scratch: an empty folder, for files on the way.

    Raises:
        ModelLoadError: architecture, configuration or tokenizer are not among those that can be written.
    """
    config = llama_config(merged.model.config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_name(Path(merged.source.name).name)
    writer.add_file_type(_FILE_TYPES[merged.model.dtype][1])
    _add_hyperparameters(writer, config)
    add_tokenizer(writer, merged, scratch)
    _write_tensors(writer, merged.model, config)


def llama_config(config: PreTrainedConfig) -> LlamaConfig | MistralConfig:
    """The configuration, if llama.cpp's `llama` architecture computes the same with it.

    Raises:
        ModelLoadError: it does not.
    """
    if not isinstance(config, LlamaConfig | MistralConfig):
        raise unsupported(f"architecture {config.model_type}")
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        raise unsupported(f"rope_type {rope['rope_type']}")
    if isinstance(config, MistralConfig) and config.sliding_window is not None:
        raise unsupported(f"sliding_window {config.sliding_window}")
    if config.hidden_act != "silu":
        raise unsupported(f"hidden_act {config.hidden_act}")
    return config


def unsupported(what: str) -> ModelLoadError:
    """The error for what cannot be written as GGUF here."""
    return ModelLoadError(
        f"{what}: cannot be written as GGUF; export as safetensors, and convert the folder with "
        "convert_hf_to_gguf.py of llama.cpp"
    )


def interleave_rotary(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from the halves that transformers rotates to the neighbours that llama.cpp rotates.

    Args:
        weight: [num_heads * D, ...], a query or key projection, or its bias.
        num_heads: of queries or of keys.
    """
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _add_hyperparameters(writer: gguf.GGUFWriter, config: LlamaConfig | MistralConfig) -> None:
    head_size = _head_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_num_key_value_heads(config))
    if head_size * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(dict(config.rope_parameters or {})["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, config: LlamaConfig | MistralConfig) -> None:
    """Header and metadata first, then one tensor after the other: no second copy of the model in memory."""
    for name, tensor in _tensors(model, config):
        array, kind = _stored(tensor)
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for _, tensor in _tensors(model, config):
            writer.write_tensor_data(_stored(tensor)[0])
    finally:
        writer.close()


def _tensors(model: PreTrainedModel, config: LlamaConfig | MistralConfig) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name in GGUF; a tied output head is left out, which is how GGUF says that it is tied."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": _num_key_value_heads(config)}
    for name, tensor in model.named_parameters():  # names a tied weight once
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise unsupported(f"weight {name}")
        num_heads = heads.get(name.split(".")[-2])
        yield gguf_name, tensor.detach() if num_heads is None else interleave_rotary(tensor.detach(), num_heads)


def _stored(tensor: Tensor) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """The tensor as it is written: vectors in float32, as llama.cpp wants; bfloat16, unknown to numpy, as bytes."""
    if tensor.ndim == 1:
        return tensor.float().numpy(), gguf.GGMLQuantizationType.F32
    values = tensor.contiguous()
    kind = _FILE_TYPES[values.dtype][0]
    return (values.view(torch.uint8) if values.dtype is torch.bfloat16 else values).numpy(), kind


def _head_size(config: LlamaConfig | MistralConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def _num_key_value_heads(config: LlamaConfig | MistralConfig) -> int:
    return config.num_key_value_heads or config.num_attention_heads
