"""Jacobi decoding as maths on a window of tokens (arXiv:2403.00835). Pure functions; the one home of its terms.

A *window* is the last accepted token followed by a *draft* of n - 1 guessed tokens. One forward pass predicts the
token after each of them. A *Jacobi iteration* is one such pass with what follows from it:

- *accepted*: the longest draft prefix that the predictions confirm, and the one prediction after it; 1..n tokens.
- *fixed point*: a draft that its own predictions repeat; it equals what decoding token by token (AR) gives.
- *fast-forwarded*: accepted tokens beyond the first of an iteration.
- *stationary*: draft tokens already right while one before them is still wrong, and staying so.

::

    position      p        p+1      p+2      p+3            p = last accepted position, n = 4
    window        x0       x1       x2       x3             x0 accepted, x1..x3 draft
    prediction             y0       y1       y2       y3
    x1 == y0, x2 != y1:    accepted y0 y1;  y2 y3 stay where they are and begin the next draft

Writing every prediction to the place it predicts (position p + 1 + i) is the whole update: the accepted tokens and
the shifted draft are then in place. Any other draft may take its place (see `drafters`): a draft decides how many
tokens are accepted, never which.
"""

from collections.abc import Sequence


def count_matched(window: Sequence[int], predicted: Sequence[int]) -> int:
    """Length of the draft prefix that the model confirmed: the fixed-point test x[i+1] == f(x[..i]).

    Args:
        window: n tokens, the last accepted one followed by the draft.
        predicted: n tokens, predicted[i] is the model's token after window[: i + 1].

    Returns:
        0..n - 1. The row gains one token more than this: the prediction after the match.
    """
    for index in range(len(window) - 1):
        if window[index + 1] != predicted[index]:
            return index
    return len(window) - 1
