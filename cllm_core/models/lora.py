"""One LoRA adapter in PEFT's format, read to be added to the results of linear layers instead of to their weights.

What cannot be had that way (DoRA, trained embeddings, ...) is refused by name; merging, in `cllm_core.models.adapter`,
can do more.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor

from cllm_core.errors import ModelLoadError
from cllm_core.models.adapter import adapter_kind, read_adapter_config

_WEIGHT_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")

# Settings of peft.LoraConfig that change what is computed, and what to call them.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "layers trained as a whole (modules_to_save)",
    "trainable_token_indices": "trained embeddings (trainable_token_indices)",
    "lora_bias": "biases (lora_bias)",
    "layer_replication": "replicated layers (layer_replication)",
    "target_parameters": "parameters outside of linear layers (target_parameters)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Initialisations that leave the base's weights alone; the others (PiSSA, OLoRA, ...) change them for training.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Features of a linear layer."""

    num_in: int
    num_out: int


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to the result of a linear layer: x @ down.T @ up.T, for x [T, in]."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r], the adapter's scale in it

    @property
    def rank(self) -> int:
        """Of the product of both."""
        return self.down.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory of both."""
        return self.down.nbytes + self.up.nbytes

    def to(self, device: torch.device, dtype: torch.dtype) -> "LowRank":
        """The same on another device or in another precision."""
        return LowRank(self.down.to(device, dtype), self.up.to(device, dtype))


def read_lora(folder: Path, linears: Mapping[str, LinearShape], *, base_name: str) -> dict[str, LowRank]:
    """The adapter's weights by the name of the base's layer, float32 on the CPU.

    Args:
        folder: of the adapter: adapter_config.json and its weights.
        linears: layers of the base that an adapter may change, by name.
        base_name: what the base is called, for messages.

    Raises:
        ModelLoadError: the adapter is damaged, does not fit the base, or is of a kind that only merging can serve.
    """
    config = read_adapter_config(folder)
    if not isinstance(config, peft.LoraConfig):
        raise ModelLoadError(
            f"{folder}: is a {adapter_kind(config)} adapter; only LoRA adapters can be served beside their base"
        )
    _require_plain(config, folder)
    pairs = _pair(_read_tensors(folder), folder)
    misfit = _misfit(config, pairs, linears)
    if misfit is not None:
        trained_on = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
        raise ModelLoadError(
            f"{folder}: the adapter does not fit {base_name}; was it trained on another base{trained_on}? {misfit}"
        )
    return {
        layer: LowRank(down=down.float(), up=up.float() * _scale(config, layer, rank=down.shape[0]))
        for layer, (down, up) in pairs.items()
    }


def _require_plain(config: peft.LoraConfig, folder: Path) -> None:
    settings = vars(config)  # PEFT versions differ in what they have
    found = [title for name, title in _UNSUPPORTED.items() if settings.get(name)]
    if config.bias != "none":
        found.append(f"biases (bias={config.bias!r})")
    if config.init_lora_weights not in _PLAIN_INITIALISATIONS:
        found.append(f"weights that start from a changed base (init_lora_weights={config.init_lora_weights!r})")
    if found:
        raise ModelLoadError(
            f"{folder}: the adapter has {', '.join(found)}, which cannot be served beside the base; "
            "merge it where it was trained and serve the merged folder"
        )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # damaged files fail in safetensors, pickle and torch, each with errors of its own
        raise ModelLoadError(f"{folder}: its weights cannot be read ({error}); fetch or save it again") from error
    return tensors


def _pair(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [r, in], B [out, r]) by layer."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _WEIGHT_NAME.fullmatch(name)
        if match is None:
            raise ModelLoadError(
                f"{folder}: holds {name}, which is no LoRA weight of a linear layer; "
                "merge the adapter where it was trained and serve the merged folder"
            )
        by_layer.setdefault(match["layer"], {})[match["part"]] = tensor
    halves = sorted(layer for layer, parts in by_layer.items() if len(parts) < 2)
    if halves or not by_layer:
        missing = f"half of the weights of {halves[0]}" if halves else "weights"
        raise ModelLoadError(f"{folder}: has not got {missing}; fetch or save the adapter again")
    return {layer: (parts["A"], parts["B"]) for layer, parts in by_layer.items()}


def _misfit(
    config: peft.LoraConfig, pairs: Mapping[str, tuple[Tensor, Tensor]], linears: Mapping[str, LinearShape]
) -> str | None:
    """Why the adapter cannot belong to these layers, None where it does."""
    for layer, (down, up) in pairs.items():
        shape = linears.get(layer)
        if shape is None:
            return f"It changes {layer}, which is no inner linear layer of the base"
        if (down.shape[1], up.shape[0], up.shape[1]) != (shape.num_in, shape.num_out, down.shape[0]):
            return (
                f"Its weights for {layer} are {list(up.shape)} x {list(down.shape)}, "
                f"the layer's {[shape.num_out, shape.num_in]}"
            )
    lacking = sorted(name for name in linears if check_target_module_exists(config, name) and name not in pairs)
    return f"Its settings name {lacking[0]}, its weights lack it" if lacking else None


def _scale(config: peft.LoraConfig, layer: str, *, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732); alpha as PEFT finds it for the layer."""
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
