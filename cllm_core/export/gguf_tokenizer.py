"""A byte-level BPE tokenizer as metadata of a GGUF file.

GGUF names the way a text is split before the merges by a word that llama.cpp has code for; the word follows here from
what the tokenizer does, not from what the model is called.
"""

import json
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cllm_core.errors import ModelLoadError
from cllm_core.export.merged import MergedModel
from cllm_core.models.checkpoint import quiet

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What splits the text, in order, and whether a word that is a token skips the merges -> llama.cpp's word for that.
_SPLITTINGS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes, GPT-2's words",), False): "gpt-2",
    (("digits", "bytes, GPT-2's words"), False): "smollm",
    ((_LLAMA3_PATTERN, "bytes"), True): "llama-bpe",
}


def add_tokenizer(writer: gguf.GGUFWriter, merged: MergedModel, scratch: Path) -> None:
    """Add vocabulary, merges, special tokens and chat template.

    Args:
        writer: of the file.
        merged: whose tokenizer and config are written.
        scratch: an empty folder; the tokenizer's files are written there, where the gguf library reads them.

    Raises:
        ModelLoadError: this is no byte-level BPE tokenizer of a kind known here.
    """
    description = _description(merged.tokenizer)
    with quiet():
        merged.tokenizer.save_pretrained(scratch)
        merged.model.config.save_pretrained(scratch)
    tokens, types = _vocabulary(merged.tokenizer, merged.model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(description))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(scratch, load_merges=True, n_vocab=merged.model.config.vocab_size)
    special.add_special_token["bos"] = _begins_with_bos(merged.tokenizer)
    special.add_to_gguf(writer, quiet=True)


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of tokenizer.json."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unsupported(f"is Python code ({type(tokenizer).__name__})")
    description: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if description["model"]["type"] != "BPE" or description["model"].get("byte_fallback"):
        raise _unsupported("is no byte-level BPE")
    if description["normalizer"] is not None:
        raise _unsupported(f"changes the text before ({description['normalizer']['type']})")
    return description


def _splitting(description: dict[str, Any]) -> str:
    splitter = description["pre_tokenizer"] or {"type": "none"}
    parts = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    key = (tuple(_name_part(part) for part in parts), bool(description["model"].get("ignore_merges")))
    if key not in _SPLITTINGS:
        raise _unsupported("splits texts in another way than " + ", ".join(sorted(_SPLITTINGS.values())))
    return _SPLITTINGS[key]


def _name_part(part: dict[str, Any]) -> str:
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return "bytes, GPT-2's words" if use_regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return json.dumps(part)


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Text and kind of every row of the embedding; rows that no token uses get names of their own."""
    texts = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens = [texts.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)]
    types = []
    for token_id in range(vocab_size):
        if token_id not in texts:
            types.append(gguf.TokenType.UNUSED)
        elif token_id in added:
            types.append(gguf.TokenType.CONTROL if added[token_id].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    return tokens, types


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: list[int] = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _unsupported(reason: str) -> ModelLoadError:
    return ModelLoadError(
        f"the tokenizer {reason}, which cannot be written as GGUF; export as safetensors, and convert the folder with "
        "convert_hf_to_gguf.py of llama.cpp"
    )
