"""AdapterStore: reads adapters for the loaded model, describes them, and puts their weights into its bank."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from msgspec.structs import replace

from cllm_core.config import DEFAULT_BLOCK_LENGTH, EngineConfig
from cllm_core.errors import ModelLoadError
from cllm_core.info import AdapterInfo, TokenizerBundle
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.chat_templates import ChatTemplates, check_templates
from cllm_core.models.checkpoint import Checkpoint, has_tokenizer, read_tokenizer
from cllm_core.models.cllm_json import read_card
from cllm_core.models.end_tokens import token_ids_in
from cllm_core.models.loader import LoadedModel
from cllm_core.models.lora import LowRank, read_lora
from cllm_core.models.tokenizer import build_bundle

_REVISION_BYTES = 8
_TEMPLATE_FILE = "chat_template.jinja"


class AdapterStore:
    """Holds adapters by id for one model.

    Args:
        bank: of the model, every product attached.
        loaded: the model.
        config: its limits and block length.
    """

    def __init__(self, bank: AdapterBank, loaded: LoadedModel, config: EngineConfig) -> None:
        self._bank, self._loaded, self._config = bank, loaded, config

    def load(self, adapter_id: int, *, name: str, path: str, folder: Path) -> AdapterInfo:
        """Read an adapter and hold it under an unused id above 0.

        Args:
            adapter_id: that rows name it by.
            name, path: of the description.
            folder: to read.

        Raises:
            ModelLoadError: it is damaged, does not fit the base or the memory, or cannot be served beside the base.
        """
        layers = read_lora(folder, self._bank.linears, base_name=self._loaded.name)
        rank, highest = max(weights.rank for weights in layers.values()), self._config.max_adapter_rank
        if rank > highest:
            raise ModelLoadError(f"{path}: has rank {rank}, more than max_adapter_rank={highest} allows; raise that")
        tokenizer, eos_token_ids = self._read_tokenizer(folder, path)
        card = read_card(folder)
        if card is not None and card.gated:
            raise ModelLoadError(f"{path}: is a gated adapter, which answers nothing itself; give it as gated_adapter")
        block_length = card.block_length if card else self._loaded.block_length
        return AdapterInfo(
            name=name,
            path=path,
            revision=_revision(folder),
            rank=rank,
            num_bytes=self._hold(adapter_id, layers, path),
            block_length=self._config.block_length or block_length or DEFAULT_BLOCK_LENGTH,
            domain=card.domain if card else self._loaded.domain,
            eos_token_ids=eos_token_ids,
            tokenizer=tokenizer,
        )

    def drop(self, adapter_id: int) -> None:
        """Give an adapter's memory back; no-op where the id is not held."""
        self._bank.drop(adapter_id)

    def _hold(self, adapter_id: int, layers: Mapping[str, LowRank], path: str) -> int:
        try:
            return self._bank.load(adapter_id, layers)
        except torch.OutOfMemoryError as error:
            raise ModelLoadError(f"{path}: does not fit the device's memory; unload another adapter") from error

    def _read_tokenizer(self, folder: Path, path: str) -> tuple[TokenizerBundle | None, tuple[int, ...]]:
        """The adapter's own tokenizer and template, None where they are the base's, and its end tokens."""
        base, eos_token_ids = self._loaded.tokenizer, set(self._loaded.eos_token_ids)
        template = folder / _TEMPLATE_FILE
        if has_tokenizer(folder):
            tokenizer = read_tokenizer(Checkpoint(folder), self._loaded.model.config)
            bundle = build_bundle(tokenizer, model_name=path)
            if bundle.chat_template is None:
                bundle = replace(bundle, chat_template=base.chat_template, tool_use_template=base.tool_use_template)
            vocab_size = self._loaded.model.config.get_text_config(decoder=True).vocab_size
            eos_token_ids |= token_ids_in(tokenizer.eos_token_id, vocab_size, place=f"{path}: its tokenizer")
        elif template.is_file():
            bundle = replace(base, chat_template=template.read_text(encoding="utf-8"), tool_use_template=None)
        else:
            bundle = base
        # Here, and not at every request for the adapter.
        check_templates(ChatTemplates(default=bundle.chat_template, tool_use=bundle.tool_use_template), path)
        return None if bundle == base else bundle, tuple(sorted(eos_token_ids))


def _revision(folder: Path) -> str:
    """Digest of weights and settings."""
    digest = hashlib.blake2b(digest_size=_REVISION_BYTES)
    for path in sorted(folder.glob("adapter_*")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    return digest.hexdigest()
