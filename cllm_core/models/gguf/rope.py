"""Rotary embeddings in GGUF's terms: a base, a scaling type with its numbers, and tensors of factors.

A factor divides the frequency of its pair of dimensions. llama.cpp's converter writes the `llama3` scaling as such
factors alone; its parameters are found again where they are the published ones, and any other factors are taken as
they are, as a `longrope` whose short and long factors are the same.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cllm_core.models.frequencies import Parameters, frequencies, head_size_of, parameters_of, unscaled_frequencies
from cllm_core.models.gguf.file import Value
from cllm_core.models.gguf.source import ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT, ROPE_FREQS, Source

_DEFAULT_BASE: Final = 10000.0  # llama.cpp's, where a file has no rope.freq_base
_LLAMA3: Final[Mapping[str, Any]] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_rope(source: Source, *, head_size: int) -> Parameters:
    """transformers' `rope_parameters`.

    Args:
        source: whose keys `rope.*` and factors are read.
        head_size: of a query head.

    Raises:
        ModelLoadError: the keys are incomplete or not understood.
    """
    rotated = source.keys.integer("rope.dimension_count", head_size)
    parameters = {"rope_theta": read_base(source, "rope.freq_base"), **_read_scaling(source, rotated)}
    if rotated != head_size:
        parameters["partial_rotary_factor"] = rotated / head_size
    return parameters


def read_base(source: Source, key: str) -> float:
    """The base of the frequencies; llama.cpp's where the file does not say."""
    return source.keys.number(key, _DEFAULT_BASE)


def _read_scaling(source: Source, rotated: int) -> Parameters:
    keys = source.keys
    keys.ignore(["rope.scaling.finetuned", "rope.scaling.original_context_length"])  # where no scaling reads it
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    if source.factors:
        if factor != 1.0:
            raise keys.wrong("rope.scaling.factor", "but the file has tensors of factors, too")
        return _read_factors(source, kind, rotated)
    if kind == "yarn":
        return _read_yarn(source, factor)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    raise keys.wrong("rope.scaling.type", "but the file has no factors for it" if kind == "longrope" else "not known")


def _read_yarn(source: Source, factor: float) -> Parameters:
    keys = source.keys
    attention = keys.number("rope.scaling.yarn_attn_factor", _yarn_attention(factor))
    parameters: Parameters = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", keys.integer("context_length")
        ),
        "attention_factor": attention * keys.number("rope.scaling.attn_factor", 1.0),
    }
    for name in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{name}" in keys:
            parameters[name] = keys.number(f"rope.scaling.yarn_{name}")
    if keys.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise keys.wrong("rope.scaling.yarn_ext_factor", "must be 1")
    return parameters


def _yarn_attention(factor: float) -> float:
    """What both sides multiply cosine and sine with, unless told otherwise (arXiv:2309.00071, equation 22)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _read_factors(source: Source, kind: str, rotated: int) -> Parameters:
    keys = source.keys
    for name, factors in source.factors.items():
        if factors.shape != (rotated // 2,):
            raise keys.wrong("rope.dimension_count", f"but {name} has the shape {tuple(factors.shape)}")
    if ROPE_FREQS in source.factors:
        if kind not in ("none", "linear"):
            raise keys.wrong("rope.scaling.type", f"but {ROPE_FREQS} already scales")
        base = read_base(source, "rope.freq_base")
        return _llama3_of(source.factors[ROPE_FREQS], base) or _longrope(source, ROPE_FREQS, ROPE_FREQS)
    if kind not in ("linear", "longrope"):
        raise keys.wrong("rope.scaling.type", "but the file has factors for longrope")
    return _longrope(source, ROPE_FACTORS_SHORT, ROPE_FACTORS_LONG)


def _longrope(source: Source, short: str, long: str) -> Parameters:
    keys = source.keys
    for name in (short, long):
        if name not in source.factors:
            raise keys.wrong("rope.scaling.type", f"but the file has no {name}")
    return {
        "rope_type": "longrope",
        "short_factor": source.factors[short].tolist(),
        "long_factor": source.factors[long].tolist(),
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", keys.integer("context_length")
        ),
        "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
    }


def _llama3_of(factors: Tensor, base: float) -> Parameters | None:
    """The published parameters of Llama 3.1 and later, if they give these factors."""
    size = 2 * factors.numel()
    parameters = {**_LLAMA3, "factor": float(factors.max()), "rope_theta": base}
    if parameters["factor"] <= 1.0:
        return None
    config = LlamaConfig(
        hidden_size=size,
        num_attention_heads=1,
        max_position_embeddings=2 * _LLAMA3["original_max_position_embeddings"],
        rope_parameters=dict(parameters),
    )
    return parameters if torch.allclose(_factors_of(config, None), factors, rtol=1e-4) else None


def write_rope(config: PreTrainedConfig, layer_type: str | None = None) -> tuple[dict[str, Value], dict[str, Tensor]]:
    """Keys below the architecture's prefix, and tensors of factors; the inverse of `read_rope`.

    Args:
        config: whose `rope_parameters` are written.
        layer_type: whose parameters, where layers of two types have their own.

    Raises:
        ValueError: GGUF has no place for this type of scaling.
    """
    parameters = parameters_of(config, layer_type)
    rotated = int(head_size_of(config) * parameters.get("partial_rotary_factor", 1.0))
    keys: dict[str, Value] = {"rope.dimension_count": rotated, "rope.freq_base": float(parameters["rope_theta"])}
    kind = parameters.get("rope_type", "default")
    match kind:
        case "default":
            return keys, {}
        case "linear":
            return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}, {}
        case "llama3":
            return keys, {ROPE_FREQS: _factors_of(config, layer_type)}
        case "yarn":
            return keys | _write_yarn(config, parameters, layer_type), {}
        case "longrope":
            return _write_longrope(config, parameters, keys)
    raise ValueError(f"rope_type {kind}")


def _write_yarn(config: PreTrainedConfig, parameters: Parameters, layer_type: str | None) -> dict[str, Value]:
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"), layer_type=layer_type)
    factor = float(parameters["factor"])
    keys: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(parameters["original_max_position_embeddings"]),
    }
    if not math.isclose(attention, _yarn_attention(factor)):
        keys["rope.scaling.attn_factor"] = attention / _yarn_attention(factor)
    for name in ("beta_fast", "beta_slow"):
        if parameters.get(name) is not None:
            keys[f"rope.scaling.yarn_{name}"] = float(parameters[name])
    return keys


def _write_longrope(
    config: PreTrainedConfig, parameters: Parameters, keys: dict[str, Value]
) -> tuple[dict[str, Value], dict[str, Tensor]]:
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    keys |= {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": int(parameters["original_max_position_embeddings"]),
        "rope.scaling.attn_factor": float(attention),
    }
    return keys, {
        ROPE_FACTORS_SHORT: torch.tensor(parameters["short_factor"], dtype=torch.float32),
        ROPE_FACTORS_LONG: torch.tensor(parameters["long_factor"], dtype=torch.float32),
    }


def _factors_of(config: PreTrainedConfig, layer_type: str | None) -> Tensor:
    """What the scaling divides each frequency by."""
    scaled, _ = frequencies(config, layer_type, 0)
    return unscaled_frequencies(config, parameters_of(config, layer_type)) / scaled
