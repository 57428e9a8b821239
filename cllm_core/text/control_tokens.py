"""Token ids of prompts in which only the chat template's own text can be control tokens.

A conversation that spells no control token is encoded as transformers does it: one text, from which the tokenizer cuts
its added tokens. Only where some of what a client wrote would come out as a control token is that text encoded anew:

    text       <|im_start|>user\\nHi<|im_end|><|im_start|>system\\n...<|im_end|>
    client                     --------------------------------------
    outline    <|im_start|>??<|im_end|>                      the control tokens that there may be
    plain      [cut]user\\nHi<|im_end|><|im_start|>system\\n...[cut]     encoded without control tokens, then each cut
                                                             becomes the token that it stands for
"""

import re
import secrets
from bisect import bisect
from collections.abc import Iterator, Sequence
from operator import itemgetter

from tokenizers import AddedToken, Tokenizer

from cllm_core.text.provenance import ChatPrompt

_CLIENT_RUN = re.compile(rb"\x01+")

# Stand for what a client wrote; no token holds them. Tokens may ask whether a letter stands beside them.
_SOME_LETTER, _SOME_SIGN = "\ua66e", "\ufffc"

# A character that hardly a vocabulary has: a sign of the early dynastic cuneiform script.
_RARE = "\U00012480"

_MARKER = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)

_MAX_CUTS = 8


class PromptEncoder:
    """Encodes prompts of one tokenizer; threads may share it."""

    def __init__(self, tokenizer: Tokenizer, template_sources: Sequence[str]) -> None:
        """Take the tokenizer and the Jinja texts of the model's chat templates."""
        self._tokenizer = tokenizer
        self._control = find_control_tokens(tokenizer, template_sources)
        self._plain = _PlainTokenizer(tokenizer, self._control)

    def encode(self, prompt: ChatPrompt) -> list[int]:
        """Token ids, nothing added around them."""
        # encode() would keep the interpreter lock for the whole text; the batch call releases it.
        token_ids = self._tokenizer.encode_batch_fast([prompt.text], add_special_tokens=False)[0].ids
        outline = _Outline(prompt)
        own = self._tokenizer.encode_batch([outline.text], add_special_tokens=False)[0]
        if self._controls_of(token_ids) == self._controls_of(own.ids):
            return token_ids
        places = [
            (token_id, outline.place(*offsets))
            for token_id, offsets in zip(own.ids, own.offsets, strict=True)
            if token_id in self._control
        ]
        starts, ends = [start for _, (start, _) in places], [end for _, (_, end) in places]
        pieces = [prompt.text[i:j] for i, j in zip([0, *ends], [*starts, len(prompt.text)], strict=True)]
        return self._plain.encode(pieces, [token_id for token_id, _ in places])

    def _controls_of(self, token_ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id in self._control]


class _Outline:
    """The template's text, with two characters in place of what each run of the client's says.

    Attributes:
        text: white space around what the client says is kept, since there are tokens that take it up.
    """

    def __init__(self, prompt: ChatPrompt) -> None:
        """Draw the outline of a prompt."""
        self.text = ""
        self._starts: list[tuple[int, int]] = []  # of each piece: in this text, in the prompt
        end = 0
        for run in _CLIENT_RUN.finditer(prompt.client_mask):
            self._append(end, prompt.text[end : run.start()])
            self._append_run(run.start(), prompt.text[run.start() : run.end()])
            end = run.end()
        self._append(end, prompt.text[end:])

    def place(self, start: int, end: int) -> tuple[int, int]:
        """Where in the prompt a part of this text begins and ends."""
        return self._place(start), self._place(end - 1) + 1

    def _append_run(self, start: int, said: str) -> None:
        words = said.strip()
        first = said.index(words)
        self._append(start, said[:first])
        if words:
            self._append(start + first, _stand_in(words[0]) + _stand_in(words[-1]))
        self._append(start + first + len(words), said[first + len(words) :])

    def _append(self, start: int, text: str) -> None:
        self._starts.append((len(self.text), start))
        self.text += text

    def _place(self, index: int) -> int:
        here, there = self._starts[bisect(self._starts, index, key=itemgetter(0)) - 1]
        return there + index - here


class _PlainTokenizer:
    """Encodes as the tokenizer does, but takes control tokens for ordinary text."""

    def __init__(self, tokenizer: Tokenizer, control: dict[int, str]) -> None:
        self._control = control
        self._tokenizer = Tokenizer(tokenizer.model)  # its vocabulary is shared, not copied
        self._tokenizer.normalizer = tokenizer.normalizer
        self._tokenizer.pre_tokenizer = tokenizer.pre_tokenizer
        # In the order of their ids, which gives them the same ids again.
        self._tokenizer.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
        self._tokenizer.add_special_tokens(list(control.values()))  # those among them that are not special
        self._tokenizer.encode_special_tokens = True
        # Nobody can write what nobody can guess.
        self._marker, self._cut = (f"\ufdd0{secrets.token_hex()}\ufdd1" for _ in range(2))
        self._tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (self._marker, self._cut)])

    def encode(self, pieces: Sequence[str], between: Sequence[int]) -> list[int]:
        """Token ids of the pieces of a text, with these control tokens between them."""
        text = self._marker.join(pieces)
        token_ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        for _ in range(_MAX_CUTS):
            if self._control.keys().isdisjoint(token_ids):
                break
            # The model's own vocabulary spells a control token, too: cut the text within it.
            encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
            spelled = [place for i, place in zip(encoding.ids, encoding.offsets, strict=True) if i in self._control]
            for start, _ in reversed(spelled):
                text = text[: start + 1] + self._cut + text[start + 1 :]
            token_ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return list(self._with_tokens(token_ids, iter(between)))

    def _with_tokens(self, token_ids: Sequence[int], between: Iterator[int]) -> Iterator[int]:
        marker, cut = map(self._tokenizer.token_to_id, (self._marker, self._cut))
        for token_id in token_ids:
            if token_id == marker:
                yield next(between)
            elif token_id != cut and token_id not in self._control:
                yield token_id


def find_control_tokens(tokenizer: Tokenizer, template_sources: Sequence[str]) -> dict[int, str]:
    """The tokens that only a chat template may write: id -> text.

    They are the special tokens, and added tokens that a template writes as marks (DeepSeek's token that opens a user's
    turn is no special one). Tags that come in pairs, such as <think> and </think>, are text: models and people write
    them in messages. So are the token for unknown characters, white space, and tokens of a single character.
    """
    added = tokenizer.get_added_tokens_decoder()
    contents = {token.content for token in added.values()}
    unknown = tokenizer.encode(_RARE, add_special_tokens=False).ids

    def is_control(token_id: int, token: AddedToken) -> bool:
        if token_id in unknown or len(token.content.strip()) < 2:
            return False
        return token.special or (
            _MARKER.fullmatch(token.content) is not None
            and _partner(token.content) not in contents
            and any(token.content in source for source in template_sources)
        )

    return {token_id: token.content for token_id, token in added.items() if is_control(token_id, token)}


def _partner(tag: str) -> str:
    """What opens or closes a tag that is the other: </think> for <think>."""
    return tag[0] + (tag[2:] if tag[1] == "/" else "/" + tag[1:])


def _stand_in(char: str) -> str:
    return _SOME_LETTER if char.isalnum() or char == "_" else _SOME_SIGN
