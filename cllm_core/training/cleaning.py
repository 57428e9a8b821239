"""Which trajectories are not worth learning from."""

from cllm_core.training.examples import Trajectory

_NGRAM = 4
_LONGEST_PHRASE = 4  # tokens of what counts as a repeated word
_MAX_IN_A_ROW = 10


def reason_to_drop(trajectory: Trajectory, *, keep_unfinished: bool, max_repetition: float) -> str | None:
    """Why a trajectory is left out, None where it is good.

    Args:
        trajectory: just recorded.
        keep_unfinished: whether an answer may stop at the limit.
        max_repetition: the share of repeated 4-grams that is still good; 1.0 keeps every repetition.
    """
    if len(trajectory.output_ids) < 2:
        return "empty answer"
    if not trajectory.finished and not keep_unfinished:
        return "no end within the limit"
    if repetition(trajectory.output_ids) > max_repetition:
        return "repetition"
    if max_repetition < 1.0 and stutters(trajectory.output_ids):
        return "word repeated ten times in a row"
    return None


def repetition(token_ids: tuple[int, ...]) -> float:
    """Share of 4-grams that occurred before, 0..1; 0.0 where there are none."""
    ngrams = [token_ids[i : i + _NGRAM] for i in range(len(token_ids) - _NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def stutters(token_ids: tuple[int, ...]) -> bool:
    """Whether some word of one to four tokens stands ten times in a row, which the share over a long answer hides.

    The original training code drops trajectories for ten equal tokens in a row (arXiv:2403.00835).
    """
    return any(_longest_run(token_ids, period) >= _MAX_IN_A_ROW * period for period in range(1, _LONGEST_PHRASE + 1))


def _longest_run(token_ids: tuple[int, ...], period: int) -> int:
    """Tokens of the longest stretch that repeats itself every `period` tokens."""
    longest = run = 0
    for before, token_id in zip(token_ids, token_ids[period:], strict=False):
        run = run + 1 if token_id == before else 0
        longest = max(longest, run)
    return longest + period if longest else 0
