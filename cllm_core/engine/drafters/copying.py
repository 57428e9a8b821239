"""Drafts copied from known text: pure functions on one request's tokens, on the host.

What followed the last tokens of a text earlier in the prompt, the output, or the client's predicted output is likely to
follow them again; where they are new, random tokens of the prompt stand in, which is how training fills drafts
(arXiv:2403.00835, appendix). Texts that repeat words of the prompt are guessed well so.
"""

from dataclasses import dataclass

import numpy as np

from cllm_core.engine.ids import Ids

MAX_NGRAM = 3

# Knuth's multiplicative hash constant; drafts need variety, not quality of randomness.
_SCATTER = 2654435761


def find_continuation(corpus: Ids, suffix: Ids, near: int) -> tuple[int, int]:
    """Where the longest match of a text's last tokens ends in a corpus; of equally long ones the one nearest `near`.

    Args:
        corpus: [L] tokens to look in; a match must leave one more token to copy.
        suffix: [1..MAX_NGRAM], last tokens of the text to be continued.
        near: index in the corpus; the later of two equally near matches is taken.

    Returns:
        Index in the corpus of the token to copy first, and tokens that matched, 0..len(suffix); index 0 where none did.
    """
    ends = np.flatnonzero(corpus[:-1] == suffix[-1])
    if not len(ends):
        return 0, 0
    num_matched = 1
    while num_matched < len(suffix):
        longer = ends[ends >= num_matched]
        longer = longer[corpus[longer - num_matched] == suffix[-1 - num_matched]]
        if not len(longer):
            break
        ends, num_matched = longer, num_matched + 1
    nearest = len(ends) - 1 - int(np.abs(ends - near)[::-1].argmin())
    return int(ends[nearest]) + 1, num_matched


def scattered_tokens(prompt: Ids, first_position: int, num_tokens: int) -> Ids:
    """A token of the prompt for each position from `first_position` on, scattered by a hash of the position."""
    positions = np.arange(first_position, first_position + num_tokens)
    scattered: Ids = prompt[((positions * _SCATTER) >> 12) % len(prompt)]
    return scattered


@dataclass(frozen=True, slots=True)
class Copies:
    """What known text says to come next."""

    tokens: Ids  # [K], random tokens of the prompt where nothing was found
    is_found: bool  # whether the last token at least occurs in text or prediction
    is_trusted: bool  # whether MAX_NGRAM tokens were found in the client's prediction


def copy_known(text: Ids, *, num_prompt: int, prediction: Ids, num_tokens: int) -> Copies:
    """Guess what follows a text by what followed its last tokens before (prompt look-up decoding).

    Args:
        text: [L] prompt and accepted output.
        num_prompt: tokens of the prompt, at least 1.
        prediction: [P] what the client expects as output, preferred where it matches as long; empty where it says none.
        num_tokens: K, tokens to guess.
    """
    suffix = text[-MAX_NGRAM:]
    start, num_matched = find_continuation(text, suffix, near=len(text))
    if num_matched:
        # Copying goes round from the match to the end of the text, which continues a text that repeats itself.
        tokens = np.resize(text[start:], num_tokens)
    else:
        tokens = scattered_tokens(text[:num_prompt], len(text), num_tokens)
    if not len(prediction):
        return Copies(tokens, num_matched > 0, is_trusted=False)
    # Where the text would be in the prediction if it had followed it so far.
    start, num_predicted = find_continuation(prediction, suffix, near=len(text) - num_prompt)
    if num_predicted and num_predicted >= num_matched:
        expected = prediction[start : start + num_tokens]
        tokens[: len(expected)] = expected
    return Copies(tokens, max(num_matched, num_predicted) > 0, is_trusted=num_predicted == MAX_NGRAM)
