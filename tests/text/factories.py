"""One small tokenizer per decoder family, built with the `tokenizers` library, and codecs around them."""

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cllm_core.info import TokenizerBundle
from cllm_core.text.codec import TextCodec

Family = Callable[[], Tokenizer]

BOS = "<s>"
END = "</s>"


def make_codec(tokenizer: Tokenizer) -> TextCodec:
    return TextCodec(TokenizerBundle(tokenizer_json=tokenizer.to_str()))


def byte_level() -> Tokenizer:
    """GPT-2 and its many heirs: every byte is a character of the alphabet."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("ð", "Ł"), ("Ã", "©")]
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(_numbered(words), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, END])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2 and the published CLLM checkpoints: sentencepiece BPE, unknown characters as <0xNN> tokens."""
    merges = [("a", "b"), ("▁", "a"), ("▁", "▁")]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ü", "ab", "▁a", "▁▁"]
    tokenizer = Tokenizer(models.BPE(_numbered(words), merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([BOS, END])
    return tokenizer


def metaspace() -> Tokenizer:
    """Sentencepiece unigram: words carry their leading space, the first one loses it."""
    words = ["<unk>", "▁", "▁▁", "▁a", "a▁", "a", "b", "▁über", "é"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([BOS, END])
    return tokenizer


def word_piece() -> Tokenizer:
    """Words are joined by spaces, ## continues a word."""
    tokenizer = Tokenizer(models.WordPiece(_numbered(["[UNK]", "a", "##b", "word", ".", "##é"]), unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([BOS, END])
    return tokenizer


def word_level() -> Tokenizer:
    """No decoder: the library joins tokens by spaces."""
    tokenizer = Tokenizer(models.WordLevel(_numbered(["[UNK]", "a", "word", "é"]), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([BOS, END])
    return tokenizer


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """Id of a token that is in the vocabulary."""
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def _numbered(words: list[str]) -> dict[str, int]:
    return {word: token_id for token_id, word in enumerate(words)}
