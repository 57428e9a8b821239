"""Merging a PEFT adapter into the weights of its base, once and for all."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.adapter_vocabulary import grow_vocabulary, is_redundant, read_shapes

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_DETAIL = 300  # characters of another library's message


def merge_adapter(model: PreTrainedModel, folder: Path, *, base_name: str) -> PreTrainedModel:
    """Add the adapter to the weights.

    Args:
        model: the base in float32, so that the sum is rounded only once, by `cast_weights`; changed in place.
        folder: of the adapter: adapter_config.json and its weights.
        base_name: what the base is called, for messages.

    Returns:
        The base model with the adapter in its weights.

    Raises:
        ModelLoadError: the adapter is damaged, does not fit the base, or is of a kind that cannot be merged.
    """
    tuned = attach_adapter(model, folder, base_name=base_name)
    _require_untied(model, tuned, folder)
    replication = getattr(tuned.peft_config["default"], "layer_replication", None)
    if replication:
        _separate_replicas(model, replication)
    try:
        merged: PreTrainedModel = tuned.merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT refuses kinds of layers and broken numbers, each in its own way
        detail = shorten(str(error), _MAX_DETAIL, placeholder=" ...")
        raise ModelLoadError(f"{folder}: the adapter cannot be merged into {base_name}: {detail}") from error
    _tell_untied(merged)
    return merged


@torch.no_grad()
def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the parameters to `dtype`, in place.

    Buffers stay: rotary frequencies are kept in float32 at any precision, as are the parameters that the architecture
    lists for it.
    """
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def read_adapter_config(folder: Path) -> peft.PeftConfig:
    """The settings of an adapter whose weights are there too.

    Raises:
        ModelLoadError: either is missing, or the settings are damaged.
    """
    if not any((folder / name).is_file() for name in _WEIGHTS):  # PEFT would look for them on the Hub
        raise ModelLoadError(f"{folder}: has no {' or '.join(_WEIGHTS)}; fetch or save the adapter again")
    try:
        config: peft.PeftConfig = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT lets the errors of JSON, of its own checks and of the system through
        raise ModelLoadError(f"{folder}: adapter_config.json cannot be used: {error}") from error
    return config


def adapter_kind(config: peft.PeftConfig) -> str:
    """PEFT's name for the kind of adapter, for messages."""
    return peft.PeftType(config.peft_type).value if config.peft_type else "nameless"


def attach_adapter(model: PreTrainedModel, folder: Path, *, base_name: str, trainable: bool = False) -> peft.PeftModel:
    """Put the adapter's layers into the model, beside its weights.

    Args:
        model: the base, changed in place; its vocabulary grows to that of the adapter.
        folder: of the adapter.
        base_name: what the base is called, for messages.
        trainable: whether the adapter's weights shall learn; they are float32 then.

    Raises:
        ModelLoadError: the adapter is damaged, does not fit the base, or is of a kind that cannot be merged.
    """
    config = read_adapter_config(folder)
    if config.is_prompt_learning:
        raise ModelLoadError(f"{folder}: a {adapter_kind(config)} adapter adds to the prompt and cannot be merged")
    grow_vocabulary(model, folder, config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is checked here and raised
            config.inference_mode = not trainable
            tuned = peft.PeftModel(model, config)
            result = tuned.load_adapter(str(folder), "default", is_trainable=trainable)
    except Exception as error:  # PEFT has no error class of its own: shapes, names and files fail in many ways
        detail = shorten(str(error), _MAX_DETAIL, placeholder=" ...")  # PEFT names every weight that does not fit
        raise ModelLoadError(
            f"{folder}: the adapter does not fit {base_name}; was it trained on another base? ({detail})"
        ) from error
    shapes = read_shapes(folder)
    unexpected = [name for name in result.unexpected_keys if not is_redundant(name, shapes)]
    unmatched = sorted({*result.missing_keys, *unexpected})
    if unmatched:
        raise ModelLoadError(
            f"{folder}: the adapter does not fit {base_name}; was it trained on another base? "
            f"({len(unmatched)} of its weights have no counterpart: {unmatched[0]}, ...)"
        )
    return tuned


def _separate_replicas(model: PreTrainedModel, replication: Sequence[tuple[int, int]]) -> None:
    """Give each of the layers that PEFT made of one its own weights: merging would change shared ones more than once.

    Args:
        model: the base, its layers replicated by PEFT.
        replication: ranges of the original layers that follow one another now.
    """
    owned: set[int] = set()
    for module in model.get_decoder().modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in owned:
                setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
            owned.add(id(weight))
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "layer_types", None):  # PEFT updates the number of layers alone
        config.layer_types = [config.layer_types[layer] for first, end in replication for layer in range(first, end)]


def _tell_untied(model: PreTrainedModel) -> None:
    """Let the config say so where an adapter trained embedding or output layer apart from the other."""
    config, head = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    if config.tie_word_embeddings and head is not None and head.weight is not model.get_input_embeddings().weight:
        config.tie_word_embeddings = False


def _require_untied(model: PreTrainedModel, tuned: peft.PeftModel, folder: Path) -> None:
    """Merging into a matrix that is input embedding and output head at once would change both; training changed one."""
    if not model.config.get_text_config().tie_word_embeddings:
        return
    tied = model.get_input_embeddings().weight
    for name, module in tuned.named_modules():
        if isinstance(module, BaseTunerLayer) and getattr(module.get_base_layer(), "weight", None) is tied:
            raise ModelLoadError(
                f"{folder}: changes {name.rpartition('.')[2]}, which the base ties to another layer; "
                "merge it where it was trained and serve the merged folder"
            )
