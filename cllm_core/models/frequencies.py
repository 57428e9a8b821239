"""Frequencies of the rotary embedding that a configuration describes."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Parameters = dict[str, Any]


def parameters_of(config: PreTrainedConfig, layer_type: str | None) -> Parameters:
    """The parameters of the layers of one type, or of all layers."""
    parameters: Parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    return parameters


def frequencies(config: PreTrainedConfig, layer_type: str | None, length: int) -> tuple[Tensor, float]:
    """Inverse frequencies, [rotated dimensions / 2] float32, and what cosine and sine are multiplied with.

    Args:
        config: of a model.
        layer_type: whose parameters, where layers of two types have their own.
        length: of the text in tokens; matters to longrope.
    """
    parameters = parameters_of(config, layer_type)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return unscaled_frequencies(config, parameters), 1.0
    inverse, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length, layer_type=layer_type)
    return inverse, float(attention)


def same_rope(config: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """Whether both rotate alike, at any length of text."""
    nested = "rope_theta" not in config.rope_parameters
    for layer_type in config.rope_parameters if nested else (None,):
        for length in (0, config.max_position_embeddings):
            ours, attention = frequencies(config, layer_type, length)
            theirs, other_attention = frequencies(other, layer_type, length)
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-5, atol=0.0):
                return False
            if not math.isclose(attention, other_attention, rel_tol=1e-6):
                return False
    return True


def unscaled_frequencies(config: PreTrainedConfig, parameters: Parameters) -> Tensor:
    """Inverse frequencies before any scaling, [rotated dimensions / 2] float32."""
    rotated = int(head_size_of(config) * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    return 1.0 / torch.pow(float(parameters["rope_theta"]), exponents)


def head_size_of(config: PreTrainedConfig) -> int:
    """Size of a query head, stated or from the model's width."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
