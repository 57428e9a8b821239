"""Folders that transformers 4 reads as transformers 5 does.

Release 5 renamed two things that release 4 then misses: the parameters of the rotary embedding, without which it
computes with others in silence, and the class of tokenizers that have no code of their own. Both names are written;
release 5 still knows the old ones.
"""

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cllm_core.models.checkpoint import quiet
from cllm_core.models.frequencies import same_rope

logger = logging.getLogger(__name__)

_CONFIG: Final = "config.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_SENTENCEPIECE: Final = "tokenizer.model"
# What a few architectures called these values in release 4.
_OWN_NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    model_type: {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    for model_type in ("gpt_neox", "gpt_neox_japanese")
}
# Whose layers with a window had a base of their own then; others came with release 5.
_WITH_LOCAL_BASE: Final = frozenset(("gemma3_text", "gemma3n_text"))
_CLASS_OF_5, _CLASS_OF_BOTH = "TokenizersBackend", "PreTrainedTokenizerFast"
_OF_LOADING: Final = ("backend", "is_local", "local_files_only")  # how a tokenizer was loaded, not what it is


def save_model(model: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write weights (safetensors), config.json and generation_config.json.

    Args:
        model: whose configuration is written.
        folder: to write to.
        state_dict: weights to write in place of the model's.
    """
    with quiet():
        model.save_pretrained(folder, state_dict=state_dict)
        path = folder / _CONFIG
        values = with_old_names(model.config, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def with_old_names(config: PreTrainedConfig, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json with the names that release 4 has for the rotary embeddings, too.

    Args:
        config: of the model.
        saved: what release 5 writes for it.
    """
    values = dict(saved)
    text_config: PreTrainedConfig | None = getattr(config, "text_config", None)
    if text_config is not None and "text_config" in values:
        values["text_config"] = with_old_names(text_config, values["text_config"])
    added = _old_rope(config)
    if not added:
        return values
    try:
        restored = type(config).from_dict(copy.deepcopy({**values, **added}))  # which fills in what is missing
    except ValueError as error:  # transformers 5.17 does not read the Dbrx configurations that it writes
        logger.warning("transformers does not read its own configuration of this %s: %s", config.model_type, error)
        return values
    if restored.rope_parameters == config.rope_parameters or same_rope(restored, config):
        return {**values, **added}
    logger.warning("transformers 4 has no names for the rotary embedding of this %s", config.model_type)
    return values


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files and its chat template.

    A SentencePiece model beside the files that it was read from is copied: llama.cpp's converter reads nothing else of
    Gemma and Phi 3.
    """
    tokenizer.save_pretrained(folder)
    origin = Path(tokenizer.name_or_path, _SENTENCEPIECE)
    if tokenizer.name_or_path and origin.is_file():
        shutil.copyfile(origin, folder / _SENTENCEPIECE)
    path = folder / _TOKENIZER_CONFIG
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    values = {name: value for name, value in values.items() if name not in _OF_LOADING}
    if values.get("tokenizer_class") == _CLASS_OF_5:
        values["tokenizer_class"] = _CLASS_OF_BOTH
        values.setdefault("model_input_names", tokenizer.model_input_names)  # release 4 would add token_type_ids
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _old_rope(config: PreTrainedConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    local = None
    if config.model_type in _WITH_LOCAL_BASE:
        parameters, local = parameters["full_attention"], parameters["sliding_attention"]
    if "rope_theta" not in parameters:
        return {}
    names = _OWN_NAMES.get(config.model_type, {})
    scaling = dict(parameters)
    values = {
        names.get(name, name): scaling.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in scaling
    }
    if local is not None:
        values["rope_local_base_freq"] = local["rope_theta"]
    if scaling.get("rope_type") == "longrope":
        values["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        if config.model_type == "phi3":  # it accepts these three and no other
            scaling = {"type": "longrope", **{name: scaling[name] for name in ("short_factor", "long_factor")}}
    if scaling != {"rope_type": "default"}:
        values["rope_scaling"] = scaling
    return values
