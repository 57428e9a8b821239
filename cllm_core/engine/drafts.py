"""Drafts copied from known text. Pure tensor functions over all rows of a step.

What followed the last tokens of a text earlier in the prompt, the output, or the client's predicted output is likely to
follow them again; where they are new, random tokens of the prompt stand in, which is how training fills drafts
(arXiv:2403.00835, appendix). Whether such a draft or the model's own is used is decided in `draft_choice`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NGRAM = 3

# Knuth's multiplicative hash constant; drafts need variety, not quality of randomness.
_SCATTER = 2654435761


def find_continuation(corpus: Tensor, corpus_end: Tensor, suffix: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Where the longest match of a row's last tokens ends in its corpus; of equally long ones the one nearest `near`.

    Args:
        corpus: [B, L] int64, tokens to look in.
        corpus_end: [B] int64 in 0..L, tokens of each row that count; a match must leave one more token to copy.
        suffix: [B, MAX_NGRAM] int64, last tokens of the text to be continued; -1 never matches.
        near: [B] int64 >= 0, index in the corpus; the later of two equally near matches is taken.

    Returns:
        [B] int64: index in the corpus of the token to copy first; [B] int64: tokens that matched, 0..MAX_NGRAM.
    """
    length = corpus.shape[1]
    index = torch.arange(length, device=corpus.device)
    matched = torch.zeros_like(corpus)
    still = index < (corpus_end - 1)[:, None]
    for back in range(min(MAX_NGRAM, length)):
        shifted = torch.full_like(corpus, -2)
        shifted[:, back:] = corpus[:, : length - back]
        still = still & (shifted == suffix[:, MAX_NGRAM - 1 - back, None])
        matched += still
    ahead = index - near[:, None].clamp(max=length)
    distance = 2 * ahead.abs() - (ahead > 0).long()  # no two places tie
    best = (matched * 4 * length - distance).argmax(dim=1)
    return best + 1, matched.gather(1, best[:, None]).squeeze(1)


def prompt_tokens(tokens: Tensor, prompt_lengths: Tensor, positions: Tensor) -> Tensor:
    """A token of the row's prompt for each position, scattered by a hash of the position.

    Args:
        tokens: [B, W] int64, whose first prompt_lengths[b] entries are the prompt.
        prompt_lengths: [B] int64, at least 1.
        positions: [B, K] int64 positions to fill.

    Returns:
        [B, K] int64 token ids.
    """
    index = ((positions * _SCATTER) >> 12) % prompt_lengths[:, None]
    return tokens.gather(1, index)


@dataclass(frozen=True, slots=True)
class Copies:
    """What known text says to come next, B rows."""

    tokens: Tensor  # [B, K] int64, random tokens of the prompt where nothing was found
    is_found: Tensor  # [B] bool, whether the last token at least occurs in text or prediction
    is_trusted: Tensor  # [B] bool, whether MAX_NGRAM tokens were found in the client's prediction


def copy_known(
    tokens: Tensor,
    *,
    prompt_lengths: Tensor,
    text_ends: Tensor,
    predictions: Tensor | None,
    prediction_lengths: Tensor,
    num_tokens: int,
) -> Copies:
    """Guess what follows each row's text by what followed its last tokens before (prompt look-up decoding).

    Args:
        tokens: [B, L] int64, prompt, accepted output, then anything; at least max(text_ends) wide.
        prompt_lengths: [B] int64.
        text_ends: [B] int64, number of accepted tokens (prompt and output).
        predictions: [B, P] int64, what clients expect as output, preferred where it matches as long; None: no client.
        prediction_lengths: [B] int64, 0 where the row has none.
        num_tokens: K, tokens to guess for every row.
    """
    suffix = last_tokens(tokens, text_ends)
    steps = torch.arange(num_tokens, device=tokens.device)
    scattered = prompt_tokens(tokens, prompt_lengths, text_ends[:, None] + steps)
    copied, num_matched = continue_text(tokens, text_ends, suffix, num_tokens=num_tokens)
    guesses = copied.where((num_matched > 0)[:, None], scattered)
    if predictions is None:
        return Copies(guesses, num_matched > 0, torch.zeros_like(num_matched, dtype=torch.bool))
    copied, inside, num_predicted = continue_prediction(
        predictions, prediction_lengths, suffix, near=text_ends - prompt_lengths, num_tokens=num_tokens
    )
    is_preferred = (num_predicted > 0) & (num_predicted >= num_matched)
    guesses = copied.where(inside & is_preferred[:, None], guesses)
    return Copies(guesses, (num_matched > 0) | is_preferred, num_predicted == MAX_NGRAM)


def continue_text(tokens: Tensor, text_ends: Tensor, suffix: Tensor, *, num_tokens: int) -> tuple[Tensor, Tensor]:
    """What followed the last tokens of a text at their latest occurrence in it.

    Args:
        tokens: [B, L] int64.
        text_ends: [B] int64, number of tokens of the text.
        suffix: [B, MAX_NGRAM] int64, as in find_continuation.
        num_tokens: K.

    Returns:
        [B, K] int64 tokens; [B] int64 tokens of the suffix found.
    """
    start, num_matched = find_continuation(tokens, text_ends, suffix, near=text_ends)
    steps = torch.arange(num_tokens, device=tokens.device)
    # Copying goes round from the match to the end of the text, which continues a text that repeats itself.
    index = start[:, None] + steps % (text_ends - start).clamp(min=1)[:, None]
    return tokens.gather(1, index.clamp(max=tokens.shape[1] - 1)), num_matched


def continue_prediction(
    predictions: Tensor, prediction_lengths: Tensor, suffix: Tensor, *, near: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the client expects after the last tokens of a text.

    Args:
        predictions: [B, P] int64.
        prediction_lengths: [B] int64, 0 where the row has none.
        suffix: [B, MAX_NGRAM] int64, as in find_continuation.
        near: [B] int64, where in the prediction the text would be if it had followed it so far.
        num_tokens: K.

    Returns:
        [B, K] int64 tokens; [B, K] bool, whether each is inside the prediction; [B] int64 tokens of the suffix found.
    """
    start, num_matched = find_continuation(predictions, prediction_lengths, suffix, near)
    index = start[:, None] + torch.arange(num_tokens, device=predictions.device)
    copied = predictions.gather(1, index.clamp(max=predictions.shape[1] - 1))
    return copied, index < prediction_lengths[:, None], num_matched


def last_tokens(tokens: Tensor, ends: Tensor) -> Tensor:
    """The MAX_NGRAM tokens before position ends[b] of each row, -1 where the text begins later; [B, MAX_NGRAM]."""
    index = ends[:, None] + torch.arange(-MAX_NGRAM, 0, device=tokens.device)
    return tokens.gather(1, index.clamp(min=0)).where(index >= 0, -1)
