"""The tokenizer of a GGUF file, built from its arrays: byte-level BPE, or BPE over characters as SentencePiece has it.

It gives the ids that the model's own tokenizer.json gives. What GGUF does not say (how texts are normalised, which
special tokens swallow the spaces behind them) is taken from the models that have this kind of tokenizer.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from cllm_core.models.gguf.file import GgufFile
from cllm_core.models.gguf.keys import Keys
from cllm_core.models.gguf.splitting import SPLITTINGS
from cllm_core.models.gguf.vocabulary import CONTROL, PREFIX, SPACE, UNKNOWN, USER_DEFINED, Vocabulary, read_vocabulary

# Phi 3's special tokens swallow the spaces behind them, except for these; GGUF does not say so.
_KEEPING_SPACES: Final = frozenset(("<unk>", "<s>", "<|endoftext|>"))
_TEMPLATE: Final = "tokenizer.chat_template"
_NAMES: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# They change nothing for the two kinds of tokenizer that are read.
_UNUSED: Final = ("add_sep_token", "add_space_prefix", "pre", "remove_extra_whitespaces", "scores", "token_type_count")


def read_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer, with its special tokens and chat templates.

    Raises:
        ModelLoadError: it is of a kind that is not read, incomplete, or there are keys that are not known.
    """
    keys = Keys(file.path, file.values, PREFIX)
    vocabulary = read_vocabulary(keys)
    if vocabulary.model == "gpt2":
        tokenizer, begins = _byte_level(vocabulary, keys)
    elif vocabulary.model == "llama":
        tokenizer, begins = _sentencepiece(vocabulary, keys), True
    else:
        raise keys.wrong("model", "but only gpt2 (byte-level BPE) and llama (SentencePiece BPE) are read")
    is_phi3 = vocabulary.model == "llama" and file.values.get("general.architecture") == "phi3"
    _add_tokens(tokenizer, vocabulary, swallows_spaces=is_phi3)
    _frame(tokenizer, vocabulary, keys, begins=begins)
    keys.ignore(_UNUSED)
    keys.require_all_read()
    special = vocabulary.special
    return PreTrainedTokenizerFast(
        tokenizer_object=_HandedOver(tokenizer),
        chat_template=_chat_template(file),
        clean_up_tokenization_spaces=False,
        **{name: vocabulary.tokens[special[key]] for name, key in _NAMES.items() if key in special},
    )


class _HandedOver:
    """transformers copies the tokenizer that it is given, which takes as long as building it; this is not copied."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __deepcopy__(self, memo: object) -> Tokenizer:
        return self._tokenizer


def _byte_level(vocabulary: Vocabulary, keys: Keys) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether texts begin with bos where the file does not say."""
    name = keys.text("pre", "default")
    if name not in SPLITTINGS:
        raise keys.wrong("pre", f"but only {', '.join(SPLITTINGS)} are known")
    splitting = SPLITTINGS[name]
    merges = [_halves(merge) for merge in keys.texts("merges")]
    tokenizer = Tokenizer(models.BPE(_ids(vocabulary, keys), merges, ignore_merges=splitting.whole_words))
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    if (normalizer := splitting.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    return tokenizer, splitting.begins


def _halves(merge: str) -> tuple[str, str]:
    middle = merge.index(" ", 1)
    return merge[:middle], merge[middle + 1 :]


def _ids(vocabulary: Vocabulary, keys: Keys) -> dict[str, int]:
    ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    if len(ids) != len(vocabulary.tokens):
        raise keys.wrong("tokens", f"of which only {len(ids)} differ")
    return ids


def _sentencepiece(vocabulary: Vocabulary, keys: Keys) -> Tokenizer:
    scores = keys.numbers("scores")
    if len(scores) != len(vocabulary.tokens):
        raise keys.wrong("scores", f"but there are {len(vocabulary.tokens)} tokens")
    ids = _ids(vocabulary, keys)
    unknown = vocabulary.tokens[vocabulary.special["unknown"]] if "unknown" in vocabulary.special else None
    merges = sentencepiece_merges(vocabulary.tokens, vocabulary.types, scores)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = keys.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def sentencepiece_merges(tokens: Sequence[str], types: np.ndarray, scores: np.ndarray) -> list[tuple[str, str]]:
    """All pairs of tokens that spell a token, the best first: SentencePiece merges the pair whose result scores best.

    A user-defined token is never cut, whatever its score, and a longer one wins over the shorter ones within it.

    Args:
        tokens: texts by id.
        types: [len(tokens)] of gguf.TokenType.
        scores: [len(tokens)].
    """
    known = frozenset(tokens)
    is_defined = types == USER_DEFINED
    defined = [pair for token_id in np.flatnonzero(is_defined).tolist() for pair in _pairs(tokens[token_id], known)]
    defined.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    by_score = np.argsort(-scores, kind="stable")
    others = by_score[~is_defined[by_score]].tolist()
    return defined + [pair for token_id in others for pair in _pairs(tokens[token_id], known)]


def _pairs(token: str, known: frozenset[str]) -> list[tuple[str, str]]:
    cuts = range(len(token) - 1, 0, -1)
    return [(left, right) for cut in cuts if (left := token[:cut]) in known and (right := token[cut:]) in known]


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, *, swallows_spaces: bool) -> None:
    """Tokens that are found in a text as a whole, whatever is around them."""
    for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        texts = (vocabulary.tokens[token_id] for token_id in np.flatnonzero(np.isin(vocabulary.types, kinds)).tolist())
        added = [
            AddedToken(text, normalized=False, special=special, rstrip=swallows_spaces and text not in _KEEPING_SPACES)
            for text in texts
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _frame(tokenizer: Tokenizer, vocabulary: Vocabulary, keys: Keys, *, begins: bool) -> None:
    """Let texts begin with bos and end with eos, where the file or else its kind of tokenizer wants it."""
    wanted = {"bos": keys.flag("add_bos_token", begins), "eos": keys.flag("add_eos_token", default=False)}
    ids = {
        name: vocabulary.special[name] for name, is_wanted in wanted.items() if is_wanted and name in vocabulary.special
    }
    if not ids:
        return
    texts = {name: vocabulary.tokens[token_id] for name, token_id in ids.items()}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*([texts["bos"]] if "bos" in ids else []), "$A", *([texts["eos"]] if "eos" in ids else [])],
        special_tokens=[(texts[name], token_id) for name, token_id in ids.items()],
    )


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    """The template, or all of them by name where there are several."""
    templates = Keys(file.path, file.values, f"{_TEMPLATE}.")
    named = {name: templates.text(name) for name in templates.ending("")}
    default = file.values.get(_TEMPLATE)
    if not named:
        return None if default is None else str(default)
    return named if default is None else {"default": str(default), **named}
