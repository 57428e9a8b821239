"""Which tokens end an output: gathered from wherever a checkpoint names them, and checked."""

import logging
from typing import TypeGuard

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from cllm_core.models.checkpoint import Checkpoint, read_generation_config

logger = logging.getLogger(__name__)


def find_eos_token_ids(
    checkpoint: Checkpoint, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """What generation config, model config and tokenizer call end of sequence; checkpoints often fill in only one.

    Returns:
        Ascending ids below the size of the vocabulary. What else is named is left out, with a warning.
    """
    generation = read_generation_config(checkpoint)
    text_config = model_config.get_text_config(decoder=True)
    stated = {
        "generation_config.json": generation.eos_token_id if generation else None,
        "config.json": getattr(text_config, "eos_token_id", None),
        "the tokenizer": tokenizer.eos_token_id,
    }
    ids: set[int] = set()
    for place, value in stated.items():
        ids |= token_ids_in(value, text_config.vocab_size, place=f"{checkpoint.path}: {place}")
    return tuple(sorted(ids))


def token_ids_in(value: object, vocab_size: int, *, place: str) -> set[int]:
    """The token ids that a checkpoint's value holds: one, a list of some, or None.

    Args:
        value: as the file has it, of any type.
        vocab_size: ids are below it.
        place: where it stands, for the warning about what is no id.
    """
    named = value if isinstance(value, list) else [] if value is None else [value]
    wrong = [entry for entry in named if not _is_id(entry, vocab_size)]
    if wrong:
        logger.warning(
            "%s names %s as end of sequence: left out, since a token id is a whole number from 0 to %d",
            place,
            ", ".join(repr(entry) for entry in wrong),
            vocab_size - 1,
        )
    return {entry for entry in named if _is_id(entry, vocab_size)}


def _is_id(entry: object, vocab_size: int) -> TypeGuard[int]:
    return isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < vocab_size
