"""Which trajectories are not worth learning from."""

from cllm_core.training.examples import Trajectory

_NGRAM = 4


def reason_to_drop(trajectory: Trajectory, *, keep_unfinished: bool, max_repetition: float) -> str | None:
    """Why a trajectory is left out, None where it is good.

    Args:
        trajectory: just recorded.
        keep_unfinished: whether an answer may stop at the limit.
        max_repetition: the share of repeated 4-grams that is still good.
    """
    if len(trajectory.output_ids) < 2:
        return "empty answer"
    if not trajectory.finished and not keep_unfinished:
        return "no end within the limit"
    if repetition(trajectory.output_ids) > max_repetition:
        return "repetition"
    return None


def repetition(token_ids: tuple[int, ...]) -> float:
    """Share of 4-grams that occurred before, 0..1; 0.0 where there are none."""
    ngrams = [token_ids[i : i + _NGRAM] for i in range(len(token_ids) - _NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
