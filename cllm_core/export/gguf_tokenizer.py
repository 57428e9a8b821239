"""A tokenizer as metadata of a GGUF file: byte-level BPE, or BPE over characters as SentencePiece has it.

GGUF names the way a text is split before the merges by a word that llama.cpp has code for; the word follows here from
what the tokenizer does, not from what the model is called.
"""

import json
import re
from typing import Any, Final

import gguf
import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cllm_core.errors import ModelLoadError
from cllm_core.export.merged import MergedModel
from cllm_core.models.gguf.splitting import SPLITTINGS, Splitting
from cllm_core.models.gguf.tokenizer import sentencepiece_merges
from cllm_core.models.gguf.vocabulary import KNOWN_ENDS, SPACE

_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")

Description = dict[str, Any]
"""The content of a tokenizer.json."""


def add_tokenizer(writer: gguf.GGUFWriter, merged: MergedModel) -> None:
    """Add vocabulary, merges, special tokens and chat template.

    Args:
        writer: of the file.
        merged: whose tokenizer is written.

    Raises:
        ModelLoadError: the tokenizer is of no kind that is known here.
    """
    description = describe(merged.tokenizer)
    tokens, types = _vocabulary(merged.tokenizer, description, merged.model.config.vocab_size)
    if description["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(_begins_with_space(description))
        writer.add_token_scores(_scores(description, tokens, types))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(description))
        writer.add_token_merges([" ".join(merge) for merge in _merges(description)])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special_ids(writer, merged)
    writer.add_add_bos_token(_begins_with_bos(merged.tokenizer))
    writer.add_add_eos_token(False)
    _add_chat_template(writer, merged.tokenizer)


def describe(tokenizer: PreTrainedTokenizerBase) -> Description:
    """The tokenizer as it would be saved.

    Raises:
        ModelLoadError: it is no BPE tokenizer of the `tokenizers` library.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unsupported(f"is Python code ({type(tokenizer).__name__})")
    description: Description = json.loads(tokenizer.backend_tokenizer.to_str())
    if description["model"]["type"] != "BPE":
        raise _unsupported(f"is of the kind {description['model']['type']}, not BPE")
    return description


def _splitting(description: Description) -> str:
    """llama.cpp's word for what happens before the merges."""
    whole_words = bool(description["model"].get("ignore_merges"))
    normalizing, splitting_steps = _steps(description["normalizer"]), _steps(description["pre_tokenizer"])
    for name, splitting in SPLITTINGS.items():
        if splitting.whole_words == whole_words and _steps_of(splitting) == (normalizing, splitting_steps):
            return name
    if normalizing:
        raise _unsupported(f"changes the text before ({', '.join(step['type'] for step in normalizing)})")
    raise _unsupported("splits texts in another way than " + ", ".join(sorted(SPLITTINGS)))


def _steps_of(splitting: Splitting) -> tuple[list[Description], list[Description]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    if (normalizer := splitting.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    description = json.loads(tokenizer.to_str())
    return _steps(description["normalizer"]), _steps(description["pre_tokenizer"])


def _steps(part: Description | None) -> list[Description]:
    """Steps of a normalizer or pre-tokenizer; offsets, which `trim_offsets` is about, do not change the tokens."""
    if part is None:
        return []
    steps: list[Description] = [part]
    if part["type"] == "Sequence":
        steps = part["normalizers"] if "normalizers" in part else part["pretokenizers"]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _begins_with_space(description: Description) -> bool:
    """Whether SentencePiece puts a space before a text, and before what follows a special token."""
    match _steps(description["normalizer"]), _steps(description["pre_tokenizer"]):
        case [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "content": "▁"}], []:
            return True
        case [{"type": "Replace", "content": "▁"}], [] | [{"type": "Split", "pattern": {"String": " "}}]:
            return False
        case [], [{"type": "Metaspace", "prepend_scheme": "always" | "never" as scheme, "split": False}]:
            return bool(scheme == "always")
    raise _unsupported("treats spaces in another way than SentencePiece in llama.cpp")


def _merges(description: Description) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in description["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _scores(description: Description, tokens: list[str], types: list[gguf.TokenType]) -> list[float]:
    """A score for each token that makes llama.cpp merge what the tokenizer merges, in the same order.

    Raises:
        ModelLoadError: there is none: the order of the merges does not follow from the tokens that come of them.
    """
    spelled = [token.replace(" ", SPACE) for token in tokens]
    merges = _merges(description)
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    by_id = [scores.get(token, -float(len(merges))) for token in spelled]
    implied = sentencepiece_merges(spelled, np.array(types), np.array(by_id, np.float32))
    if set(implied) != set(merges) or _unlike(implied, spelled, types) != _unlike(merges, spelled, types):
        raise _unsupported("merges in an order that does not follow from its tokens")
    return by_id


def _unlike(merges: list[tuple[str, str]], tokens: list[str], types: list[gguf.TokenType]) -> list[str]:
    """What comes of the merges, in order; user-defined tokens aside, which are found before any merge."""
    defined = {token for token, kind in zip(tokens, types, strict=True) if kind is gguf.TokenType.USER_DEFINED}
    return [left + right for left, right in merges if left + right not in defined]


def _vocabulary(
    tokenizer: PreTrainedTokenizerBase, description: Description, size: int
) -> tuple[list[str], list[gguf.TokenType]]:
    """Text and kind of every row of the embedding; rows that no token uses get names of their own."""
    texts = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    if max(texts) >= size:
        raise _unsupported(f"has tokens up to {max(texts)} for {size} rows of the embedding")
    added = tokenizer.added_tokens_decoder
    unknown = description["model"].get("unk_token")
    is_sentencepiece = bool(description["model"].get("byte_fallback"))
    tokens, types = [], []
    for token_id in range(size):
        text = texts.get(token_id, f"[PAD{token_id}]")
        if token_id not in texts:
            kind = gguf.TokenType.UNUSED
        elif is_sentencepiece and text == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif token_id in added:
            kind = gguf.TokenType.CONTROL if added[token_id].special else gguf.TokenType.USER_DEFINED
        elif is_sentencepiece and _BYTE.fullmatch(text):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(text.replace(SPACE, " ") if is_sentencepiece and kind is gguf.TokenType.USER_DEFINED else text)
        types.append(kind)
    return tokens, types


def _add_special_ids(writer: gguf.GGUFWriter, merged: MergedModel) -> None:
    tokenizer = merged.tokenizer
    for name, token_id in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("eot", _other_end(merged)),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if token_id is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)


def _other_end(merged: MergedModel) -> int | None:
    """An end token beside eos that readers would not know by its text; a file has a key for one."""
    for token_id in merged.eos_token_ids:
        text = merged.tokenizer.convert_ids_to_tokens(token_id)
        if token_id != merged.tokenizer.eos_token_id and text not in KNOWN_ENDS:
            return token_id
    return None


def _add_chat_template(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    template: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template is not None:
        writer.add_chat_template(template)


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: list[int] = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _unsupported(reason: str) -> ModelLoadError:
    return ModelLoadError(
        f"the tokenizer {reason}, which cannot be written as GGUF; export as safetensors, and convert the folder with "
        "convert_hf_to_gguf.py of llama.cpp"
    )
