"""DraftChoice: for a running request, whose draft comes next - the model's own or one copied from known text.

The model's own draft is what it predicted behind the accepted tokens but did not confirm. A CLLM was trained to be
right there; a plain model predicted it from a wrong token and seldom is, while texts that repeat words of the prompt
are guessed well by copying. Which of the two a request needs shows while it runs: both drafts are kept until the next
one is made, and the one that would have been confirmed further, lately, is used.
"""

import numpy as np

from cllm_core.engine.drafts import Copies, Ids

# Weight of a new observation: about the last ten drafts count. 0.1 and 0.2 did equally well (docs/log/tries.md).
_RATE = 0.1
# Equal at first, where a tie goes to the model's own draft: a few windows of a plain model are enough to lower it.
_INITIAL_LENGTH = 1.0


class DraftChoice:
    """What one request's drafts were worth."""

    def __init__(self) -> None:
        self._own_length = self._copied_length = _INITIAL_LENGTH
        self._own: Ids | None = None
        self._copied: Ids | None = None
        self._text_end = 0  # tokens of the text that the two were made for

    def choose(self, text: Ids, own: Ids, copies: Copies) -> Ids:
        """The next draft, after learning how far each of the two made before would have been confirmed.

        Args:
            text: [L] prompt and accepted output, at least as long as at the last call.
            own: [K] what the model predicted behind it.
            copies: of K tokens.

        Returns:
            [K].
        """
        self._observe(text[self._text_end :])
        self._own, self._copied = own, copies.tokens if copies.is_found else None
        self._text_end = len(text)
        is_better = copies.is_found and self._copied_length > self._own_length
        return copies.tokens if is_better or copies.is_trusted else own

    def _observe(self, accepted: Ids) -> None:
        if self._own is not None:
            self._own_length += _RATE * (_num_equal(self._own, accepted) - self._own_length)
        if self._copied is not None:
            self._copied_length += _RATE * (_num_equal(self._copied, accepted) - self._copied_length)


def _num_equal(draft: Ids, accepted: Ids) -> int:
    """Tokens that both begin with."""
    length = min(len(draft), len(accepted))
    wrong = np.flatnonzero(draft[:length] != accepted[:length])
    return int(wrong[0]) if len(wrong) else length
