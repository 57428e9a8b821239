"""The bytes that each token adds to a text, so that the text of any token sequence is their concatenation.

Owns the knowledge about decoder families: byte-level BPE, sentencepiece with byte fallback, Metaspace, and whatever
else treats a token the same wherever it stands after the first. Strips and joins that look at neighbours are put
into the piece here, once; nobody above has to decode a window of tokens again.
"""

import re
from collections.abc import Callable

import msgspec
from tokenizers import Tokenizer

# Any text that no decoder touches: what stands beside it is decoded as in the middle of a text.
_NEIGHBOUR = "a"

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Decoder(msgspec.Struct, frozen=True):
    """The part of a decoder in tokenizer.json that tells its family; `decoders` are those of a Sequence."""

    type: str
    decoders: "tuple[_Decoder, ...]" = ()

    def types(self) -> frozenset[str]:
        return frozenset({self.type}).union(*(part.types() for part in self.decoders))


class _TokenizerFile(msgspec.Struct, frozen=True):
    decoder: _Decoder | None = None


class TokenPieces:
    """Bytes of each token, in the middle of a text and at its start.

    Special tokens and ids without a token (vocabularies padded for the hardware) stand for no bytes. Pieces are cached,
    at most one per token of the vocabulary; threads may share this object.
    """

    def __init__(self, tokenizer: Tokenizer, tokenizer_json: str) -> None:
        """Take the `tokenizers` object and the JSON it was built from; msgspec.MsgspecError where that is malformed."""
        decoder = msgspec.json.decode(tokenizer_json, type=_TokenizerFile).decoder
        families = decoder.types() if decoder else frozenset[str]()
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder
        self._is_byte_level = "ByteLevel" in families
        self._has_byte_fallback = "ByteFallback" in families
        self._byte_of_char = _byte_level_alphabet() if self._is_byte_level else {}
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self._left = self._decode([_NEIGHBOUR])
        self._right = self._decode([_NEIGHBOUR, _NEIGHBOUR]).removeprefix(self._left)
        self._cache: dict[int, bytes] = {}

    @property
    def added_ids(self) -> frozenset[int]:
        """Tokens that were added to the vocabulary, special ones among them."""
        return self._added_ids

    def is_special(self, token_id: int) -> bool:
        """Whether the token marks structure (bos, end of turn, ...) and is no part of the text."""
        return token_id in self._special_ids

    def is_silent(self, token_id: int) -> bool:
        """Whether the token is passed over in a text: special, or no token of this tokenizer at all."""
        return token_id in self._special_ids or self._tokenizer.id_to_token(token_id) is None

    def piece(self, token_id: int) -> bytes:
        """Bytes that the token adds after another token; may hold an incomplete UTF-8 character."""
        cached = self._cache.get(token_id)
        if cached is None:
            cached = self._cache[token_id] = self._compute(token_id, self._between)
        return cached

    def first_piece(self, token_id: int) -> bytes:
        """Bytes of the token at the very start of a text, where some decoders take away its leading space."""
        return self._compute(token_id, self._at_start)

    def _compute(self, token_id: int, decode: Callable[[str], str]) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or self.is_special(token_id):
            return b""
        if self._is_byte_level:
            return token.encode() if token_id in self._added_ids else self._byte_level(token)
        if self._has_byte_fallback and (match := _FALLBACK_BYTE.fullmatch(token)):
            byte = bytes.fromhex(match[1])
            return byte if not byte.isascii() else decode(token).encode()
        return decode(token).encode()

    def _byte_level(self, token: str) -> bytes:
        try:
            return bytes(self._byte_of_char[char] for char in token)
        except KeyError:  # not spelled in the alphabet: the token is literal text, as the library treats it
            return token.encode()

    def _between(self, token: str) -> str:
        text = self._decode([_NEIGHBOUR, token, _NEIGHBOUR])
        return text.removeprefix(self._left).removesuffix(self._right)

    def _at_start(self, token: str) -> str:
        return self._decode([token, _NEIGHBOUR]).removesuffix(self._right)

    def _decode(self, tokens: list[str]) -> str:
        return self._decoder.decode(tokens) if self._decoder is not None else " ".join(tokens)


def _byte_level_alphabet() -> dict[str, int]:
    """Byte of each character that byte-level BPE writes: the GPT-2 table, printable bytes as they are, others moved."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}
