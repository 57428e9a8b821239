"""Text of a token stream that still grows, at a cost per token that does not depend on its length.

Works on bytes, one piece a token. Decoding a window of tokens again and comparing texts, which
`tokenizers.decoders.DecodeStream` does, raises on byte-fallback tokens that form no character and takes quadratic time
where a character never completes; a model that samples produces both.
"""

import codecs
from collections.abc import Iterable, Mapping

from cllm_core.text.pieces import TokenPieces


class Detokenizer:
    """Turns tokens into text, each character as soon as its last byte is there; what was given is never taken back.

    The chunking of the tokens does not matter. Bytes that belong to no character become U+FFFD once that is certain;
    a character still incomplete when the tokens end is left out.
    """

    def __init__(
        self, pieces: TokenPieces, *, continues_text: bool = False, spelled: Mapping[int, str] | None = None
    ) -> None:
        """Start an empty text.

        Args:
            continues_text: other text stands directly before this one, so a leading space is kept.
            spelled: special tokens that are part of this text all the same, and how they are spelled.
        """
        self._pieces = pieces
        self._spelled = {token_id: text.encode() for token_id, text in (spelled or {}).items()}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = not continues_text

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the characters that these tokens complete, special tokens left out."""
        return self._utf8.decode(b"".join(self._next_piece(token_id) for token_id in token_ids))

    def peek(self, token_ids: Iterable[int]) -> str:
        """Return what `push` would, and stay as before: for tokens that may yet change."""
        before = self._utf8.getstate(), self._at_start
        text = self.push(token_ids)
        state, self._at_start = before
        self._utf8.setstate(state)
        return text

    def _next_piece(self, token_id: int) -> bytes:
        if token_id in self._spelled:
            self._at_start = False
            return self._spelled[token_id]
        if not self._at_start:
            return self._pieces.piece(token_id)
        piece = self._pieces.first_piece(token_id)
        self._at_start = self._pieces.is_silent(token_id)
        return piece
