"""The gated adapter that an engine loads beside its model: weights for the rows that propose, and how these are fed.

Uno's layout (arXiv:2609.04010) is a model folder with the adapter in `adapter/`; an adapter's folder alone serves too.
"""

import json
from dataclasses import dataclass

import torch

from cllm_core.config import EngineConfig
from cllm_core.errors import ModelLoadError
from cllm_core.info import GatedInfo, TokenizerBundle
from cllm_core.models.adapter_bank import GATED_ADAPTER_ID, AdapterBank
from cllm_core.models.cllm_json import read_card
from cllm_core.models.loader import LoadedModel
from cllm_core.models.lora import read_lora
from cllm_core.models.progress import OnProgress
from cllm_core.models.source import locate_adapter

_DEFAULT_BLOCK_LENGTH = 8


@dataclass(frozen=True, slots=True)
class GatedAdapter:
    """A gated adapter in memory.

    Attributes:
        info: describes it.
        noise_ids: tokens that the rows which propose read.
    """

    info: GatedInfo
    noise_ids: range


def find_gated_adapter(config: EngineConfig, loaded: LoadedModel) -> str | None:
    """What to load: named by the settings, or part of the model's folder; None for none."""
    if config.gated_adapter is not None:
        return None if config.gated_adapter == "none" else config.gated_adapter
    if loaded.gated_adapter is None or config.tensor_parallel_size > 1:  # adapters are not divided
        return None
    return str(loaded.gated_adapter)


def load_gated_adapter(
    path: str, config: EngineConfig, loaded: LoadedModel, bank: AdapterBank, on_progress: OnProgress
) -> GatedAdapter:
    """Hold the adapter at `path`, a folder or Hub id, in the bank.

    Raises:
        ModelLoadError: it is damaged, does not fit the base or the memory, or is no plain LoRA.
    """
    folder = locate_adapter(path, config, on_progress)
    layers = read_lora(folder, bank.linears, base_name=loaded.name)
    try:
        num_bytes = bank.load(GATED_ADAPTER_ID, layers)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"{path}: does not fit the device's memory; serve without gated_adapter") from error
    card = read_card(folder)
    trained = card.block_length if card and card.block_length else _DEFAULT_BLOCK_LENGTH
    vocab_size = loaded.model.config.get_text_config(decoder=True).vocab_size
    info = GatedInfo(
        path=path,
        rank=max(weights.rank for weights in layers.values()),
        num_bytes=num_bytes,
        form=config.gated_form,
        max_rows=config.gated_rows or max(1, trained - 1),
    )
    return GatedAdapter(info, ordinary_tokens(loaded.tokenizer, vocab_size))


def ordinary_tokens(tokenizer: TokenizerBundle, vocab_size: int) -> range:
    """The longest run of token ids without a special token."""
    added = json.loads(tokenizer.tokenizer_json).get("added_tokens", [])
    special = sorted({token["id"] for token in added if token["special"] and token["id"] < vocab_size})
    starts = [0, *(token_id + 1 for token_id in special)]
    runs = [range(start, end) for start, end in zip(starts, [*special, vocab_size], strict=True)]
    return max(runs, key=len)
