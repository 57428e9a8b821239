"""Text to token ids and back: the `tokenizers` library behind the few calls that server and offline API need.

Built from a TokenizerBundle, so the process that uses it needs neither torch nor the checkpoint's files.
"""

from collections.abc import Iterable, Mapping
from itertools import groupby

import msgspec
from tokenizers import Tokenizer

from cllm_core.errors import InvalidRequest, ModelLoadError
from cllm_core.info import TokenizerBundle
from cllm_core.text.control_tokens import PromptEncoder
from cllm_core.text.detokenizer import Detokenizer
from cllm_core.text.pieces import TokenPieces
from cllm_core.text.provenance import ChatPrompt


class TextCodec:
    """Encodes and decodes text. Holds no state of a request, so threads may share it."""

    def __init__(self, bundle: TokenizerBundle) -> None:
        """Build the tokenizer; ModelLoadError where the bundle holds none."""
        self._tokenizer = _load(bundle.tokenizer_json)
        self._max_token_chars = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)
        try:
            self._pieces = TokenPieces(self._tokenizer, bundle.tokenizer_json)
        except msgspec.MsgspecError as error:
            raise ModelLoadError(f"decoder in tokenizer.json is malformed: {error}; {_REMEDY}") from error
        templates = (bundle.chat_template, bundle.tool_use_template)
        self._prompts = PromptEncoder(self._tokenizer, [source for source in templates if source is not None])

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's own may be larger (padding) or smaller."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def max_token_chars(self) -> int:
        """Characters that one token stands for at most, a run of unknown ones aside: bounds texts before encoding."""
        return self._max_token_chars

    def encode(self, text: str, *, add_special_tokens: bool, param: str | None = None) -> list[int]:
        """Token ids of a text, special tokens in it recognised; other threads run meanwhile.

        Args:
            add_special_tokens: add what the tokenizer puts around a text (bos); chat templates write it themselves.
            param: request field that the text came from, for the error.

        Raises:
            InvalidRequest: the text holds half of a surrogate pair, which no UTF-8 text can.
        """
        _check_unicode(text, param)
        # encode() would keep the interpreter lock for the whole text; the batch call releases it.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_chat(self, prompt: ChatPrompt, *, param: str | None = None) -> list[int]:
        """Token ids of what a chat template made of a conversation; other threads run meanwhile.

        What the conversation says is encoded without control tokens, the template's text with them.

        Args:
            prompt: of the template of this codec's bundle.
            param: request field that the conversation came from, for the error.

        Raises:
            InvalidRequest: as `encode`.
        """
        _check_unicode(prompt.text, param)
        return self._prompts.encode(prompt)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of the tokens, special ones left out: exactly what a Detokenizer yields for them."""
        return self.detokenizer().push(token_ids)

    def spell(self, token_ids: Iterable[int]) -> str:
        """Text of the tokens with the special ones spelled out: what a prompt looks like to the model."""
        parts: list[str] = []
        for is_special, group in groupby(token_ids, self.is_special):
            if is_special:
                parts += map(self.token_text, group)
            else:
                parts.append(self.detokenizer(continues_text=bool(parts)).push(group))
        return "".join(parts)

    def detokenizer(self, *, continues_text: bool = False, spelled: Mapping[int, str] | None = None) -> Detokenizer:
        """Start the text of a new token stream; arguments as in Detokenizer."""
        return Detokenizer(self._pieces, continues_text=continues_text, spelled=spelled)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token in the middle of a text, maybe part of a character; special tokens are spelled out."""
        if self.is_special(token_id):
            return (self._tokenizer.id_to_token(token_id) or "").encode()
        return self._pieces.piece(token_id)

    def token_text(self, token_id: int) -> str:
        r"""Text of one token in the middle of a text; bytes that form no character as \xNN, so that texts differ."""
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    def has_token(self, text: str) -> bool:
        """Whether the vocabulary has a token that is spelled like this, special ones included."""
        return self._tokenizer.token_to_id(text) is not None

    def added_token_id(self, text: str) -> int | None:
        """Id of the token that was added to the vocabulary (special or not) and is spelled like this, None without."""
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._pieces.added_ids else None

    @property
    def visible_added_ids(self) -> frozenset[int]:
        """Tokens that were added to the vocabulary and are part of the text (<think>, ...)."""
        return frozenset(token_id for token_id in self._pieces.added_ids if not self.is_special(token_id))

    def is_special(self, token_id: int) -> bool:
        """Whether the token marks structure (bos, end of turn, ...) and is no part of the text."""
        return self._pieces.is_special(token_id)


_REMEDY = "give a checkpoint whose tokenizer.json the tokenizers library can read"


def _load(tokenizer_json: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises no narrower type
        raise ModelLoadError(f"tokenizer.json cannot be read: {error}; {_REMEDY}") from error
    # Some checkpoints save the settings of their training run, which would cut or pad prompts in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_unicode(text: str, param: str | None) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"character {error.start} is half of a surrogate pair: send text that is valid Unicode", param=param
        ) from error
