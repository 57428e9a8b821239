"""Configuration and weights of a GGUF file in transformers' terms; its tokenizer is in `tokenizer`."""

from collections.abc import Mapping
from typing import Final

import torch
from transformers import PreTrainedConfig

from cllm_core.errors import ModelLoadError
from cllm_core.models.gguf.architectures import ARCHITECTURES, Architecture
from cllm_core.models.gguf.file import GgufFile
from cllm_core.models.gguf.keys import Keys, first_of
from cllm_core.models.gguf.source import source_of
from cllm_core.models.gguf.vocabulary import PREFIX, read_vocabulary
from cllm_core.models.gguf.weights import LazyWeight, lazy_weights

# What describes a file, and the keys of the tokenizer, which is read on its own.
_NOT_COMPUTED: Final = (
    *("general.", "split.", "quantize."),
    *(PREFIX, "tokenizer.chat_template", "tokenizer.huggingface.json"),
)


def read_gguf_config(file: GgufFile) -> PreTrainedConfig:
    """The configuration that gives what llama.cpp computes.

    Raises:
        ModelLoadError: the architecture is not among those that are read, a key is missing, not known, or has a value
            that transformers' model does not compute with, or a special token is not in the vocabulary.
    """
    architecture = architecture_of(file)
    prefixes = (*_NOT_COMPUTED, f"{architecture.name}.")
    foreign = [key for key in file.values if not key.startswith(prefixes)]
    if foreign:
        raise ModelLoadError(f"{file.path}: has keys that {architecture.name} does not have ({first_of(foreign)})")
    source = source_of(file, architecture.name)
    attributes = architecture.read(source)
    source.keys.require_all_read()
    vocabulary = read_vocabulary(Keys(file.path, file.values, PREFIX))
    if len(vocabulary.tokens) != attributes["vocab_size"]:
        raise ModelLoadError(
            f"{file.path}: {PREFIX}tokens has {len(vocabulary.tokens)} tokens, but token_embd.weight "
            f"{attributes['vocab_size']} rows; convert the model again"
        )
    ends = list(vocabulary.end_ids)
    attributes |= {
        "bos_token_id": vocabulary.special.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": vocabulary.special.get("padding"),
    }
    return architecture.config_class(**attributes)


def read_gguf_weights(file: GgufFile, config: PreTrainedConfig, dtype: torch.dtype) -> Mapping[str, LazyWeight]:
    """A state dict for the model of `config`, which `read_gguf_config` gave; quantised weights become `dtype`.

    Raises:
        ModelLoadError: the file has tensors that its architecture does not know.
    """
    return lazy_weights(file, architecture_of(file), config, dtype)


def architecture_of(file: GgufFile) -> Architecture:
    """How the file's architecture is read.

    Raises:
        ModelLoadError: it is not read, or the file holds no model.
    """
    kind = file.values.get("general.type", "model")
    if kind != "model":
        raise ModelLoadError(f"{file.path}: holds no model (general.type is {kind}); name the file of the model")
    name = str(file.values.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path}: architecture {name} is not read from GGUF, but only {', '.join(ARCHITECTURES)}; "
            "name the model's folder or Hub id"
        )
    return ARCHITECTURES[name]


def stored_gguf_dtype(file: GgufFile) -> torch.dtype | None:
    """Number format of the matrices, None where they are quantised."""
    dtypes = {tensor.dtype for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return dtypes.pop() if len(dtypes) == 1 else None
