"""Tokens of a GGUF file: their texts, types and scores, and the ids that have a meaning."""

from dataclasses import dataclass
from typing import Final

import gguf
import numpy as np

from cllm_core.models.gguf.keys import Keys

CONTROL, USER_DEFINED, UNKNOWN, NORMAL = (
    int(gguf.TokenType.CONTROL),
    int(gguf.TokenType.USER_DEFINED),
    int(gguf.TokenType.UNKNOWN),
    int(gguf.TokenType.NORMAL),
)
PREFIX: Final = "tokenizer.ggml."
SPACE: Final = "▁"  # what SentencePiece spells a space as
_ID: Final = "_token_id"
# llama.cpp's where a SentencePiece file does not name them; other files then have none.
_SENTENCEPIECE_IDS: Final = {"unknown": 0, "bos": 1, "eos": 2}
# A file names one end token, seldom two. The others are known by their text, as in llama.cpp.
KNOWN_ENDS: Final = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a file says about its tokens.

    Attributes:
        model: `gpt2` for byte-level BPE, `llama` for SentencePiece BPE, or another of llama.cpp's names.
        tokens: texts by id.
        types: [len(tokens)] int32, of gguf.TokenType.
        special: ids by their names in GGUF (bos, eos, unknown, padding, ...).
        end_ids: ascending; each of them ends an output.
    """

    model: str
    tokens: list[str]
    types: np.ndarray
    special: dict[str, int]
    end_ids: tuple[int, ...]


def read_vocabulary(keys: Keys) -> Vocabulary:
    """Read texts, types and ids.

    Args:
        keys: of the tokenizer, below PREFIX.

    Raises:
        ModelLoadError: a list is missing or too short, or an id is not one of the vocabulary; the key is named.
    """
    model = keys.text("model")
    tokens = keys.texts("tokens")
    if model == "llama":
        # Runs of spaces are stored as they look, and merged as they are spelled within a text.
        tokens = [token.replace(" ", SPACE) if token.isspace() and token[0] == " " else token for token in tokens]
    types = keys.numbers("token_type") if "token_type" in keys else np.full(len(tokens), NORMAL, np.int32)
    if len(types) != len(tokens):
        raise keys.wrong("token_type", f"but there are {len(tokens)} tokens")
    special = {
        name: token_id for name, token_id in _SENTENCEPIECE_IDS.items() if model == "llama" and token_id < len(tokens)
    }
    for key in keys.ending(_ID):
        token_id = keys.integer(key)
        if not 0 <= token_id < len(tokens):
            raise keys.wrong(key, f"but the vocabulary has {len(tokens)} tokens")
        special[key.removesuffix(_ID)] = token_id
    added = np.flatnonzero(np.isin(types, (CONTROL, USER_DEFINED)))
    ends = {int(token_id) for token_id in added if tokens[token_id] in KNOWN_ENDS}
    ends.update(special[name] for name in ("eos", "eot", "eom") if name in special)
    return Vocabulary(model, tokens, types, special, tuple(sorted(ends)))
