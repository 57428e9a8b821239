"""Log-probabilities of tokens, from the raw logits: before temperature, bias and penalties."""

from torch import Tensor


def compute_logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log-probabilities of the chosen token and of the likeliest ones.

    Args:
        logits: [T, V], any float type; not changed.
        chosen: [T] int64 token ids.
        num_top: alternatives wanted per position, 0..V.

    Returns:
        chosen_logprob [T] float32, top_ids [T, num_top] int64, best first, and top_logprobs [T, num_top] float32.
    """
    logprobs = logits.float().log_softmax(-1)
    top_logprobs, top_ids = logprobs.topk(num_top)
    return logprobs.gather(1, chosen[:, None]).squeeze(1), top_ids, top_logprobs
