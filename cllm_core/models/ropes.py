"""Rotary embeddings whose frequencies follow the length of the text (longrope, dynamic): one set for all texts.

transformers chooses the frequencies anew in every forward pass, by its largest position. In a batch that would let the
longest text decide for all, and a text's cached keys would be turned by others than its next ones. As in vLLM they are
chosen once, as for a text as long as the context served.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cllm_core.errors import ModelLoadError

logger = logging.getLogger(__name__)

# What transformers' rotary embeddings call themselves once they have nothing to choose any more.
_FIXED = "default"

_CONTEXTS = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions")


def fix_ropes(model: PreTrainedModel, max_model_len: int) -> None:
    """Let every rotary embedding of the model keep the frequencies that it has for a text of `max_model_len` tokens.

    Raises:
        ModelLoadError: an architecture goes by the length of a text in a way of its own, which cannot be fixed, or the
            config makes frequencies that are no numbers.
    """
    for name, module in model.named_modules():
        _require_finite(name, module)
        match getattr(module, "rope_type", None):
            case str() as kind if _follows_length(kind):
                _fix(module, None, max_model_len)
                module.rope_type = _FIXED
                _report(name, kind, max_model_len)
                _require_fixed(module, None, max_model_len)
            case dict() as kinds:
                for layer_type, kind in kinds.items():
                    if _follows_length(kind):
                        _fix(module, layer_type, max_model_len)
                        kinds[layer_type] = _FIXED
                        _report(f"{name} ({layer_type})", kind, max_model_len)
                        _require_fixed(module, layer_type, max_model_len)


def stated_context(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text that the config states, by whichever of the usual names; None: it states none."""
    return next((length for name in _CONTEXTS if isinstance(length := getattr(config, name, None), int)), None)


def longest_context(config: PreTrainedConfig) -> int | None:
    """Tokens that the model's positions reach, what its rope is stretched by included; None: the config states none."""
    stated = stated_context(config)
    if stated is None:
        return None
    match rope_parameters(config):
        case [{"rope_type": "linear" | "dynamic", "factor": factor}]:
            return int(stated * factor)
        case [{"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}] if original:
            return max(stated, int(original * factor))
    return stated


def original_context(config: PreTrainedConfig) -> int | None:
    """Tokens of the texts that a model was first trained with, where its config tells that it was stretched since."""
    places = [*rope_parameters(config), getattr(config, "rope_scaling", None), config.to_dict()]
    lengths = [place.get("original_max_position_embeddings") for place in places if isinstance(place, dict)]
    return min((length for length in lengths if isinstance(length, int)), default=None)


def rope_types(config: PreTrainedConfig) -> tuple[str, ...]:
    """transformers' names of the config's rotary embeddings, in order of the alphabet; none: it has no such."""
    return tuple(sorted({str(parameters.get("rope_type", "default")) for parameters in rope_parameters(config)}))


def rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Settings of the rotary embeddings: one for all layers, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict) or not found:
        return []
    of_layers = [parameters for parameters in found.values() if isinstance(parameters, dict)]
    return of_layers or [found]


def _follows_length(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _require_finite(name: str, module: nn.Module) -> None:
    for buffer_name, buffer in module.named_buffers(recurse=False):
        if buffer_name.endswith("inv_freq") and not buffer.isfinite().all():
            raise ModelLoadError(f"{name}: its frequencies are not finite; correct rope_parameters in config.json")


def _fix(module: nn.Module, layer_type: str | None, max_model_len: int) -> None:
    """Show the embedding a text of this length, upon which it takes the frequencies for it."""
    _factors(module, layer_type, [max_model_len - 1])


def _require_fixed(module: nn.Module, layer_type: str | None, max_model_len: int) -> None:
    alone, beside_others = _factors(module, layer_type, [1]), _factors(module, layer_type, [1, max_model_len - 1])
    if any(not torch.equal(one[:, :1], other[:, :1]) for one, other in zip(alone, beside_others, strict=True)):
        raise ModelLoadError(
            f"{type(module).__name__} goes by the longest text of a step in a way of its own, and a text would depend "
            f"on its company; serve it with a shorter max_model_len than {max_model_len}"
        )


@torch.no_grad()
def _factors(module: nn.Module, layer_type: str | None, positions: list[int]) -> list[torch.Tensor]:
    """What the embedding makes of these P positions: cosines and sines [1, P, D], or both in one."""
    device = next(module.buffers()).device
    extra = {} if layer_type is None else {"layer_type": layer_type}
    try:
        found = module(torch.zeros(1, device=device), torch.tensor([positions], device=device), **extra)
    except Exception as error:  # of the model's own code: most often a setting is missing
        raise ModelLoadError(
            f"{type(module).__name__} cannot be computed ({error!r}); correct rope_parameters in config.json"
        ) from error
    return list(found) if isinstance(found, tuple) else [found]


def _report(name: str, kind: str, max_model_len: int) -> None:
    logger.info("%s: %s frequencies as for a text of %d tokens, the context served", name, kind, max_model_len)
