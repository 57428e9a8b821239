"""What acts on logits before a token is chosen: pure functions, logits in, new logits of the same shape out.

They know neither rows nor requests. T is the positions that use the processor, V the vocabulary; every position is
treated by itself, so a result does not depend on the batch. Nothing here waits for the device.

Order of use: grammar, bias, suppression, penalties, temperature, top-k, top-p, min-p.
"""

import numpy as np
import torch
from torch import Tensor

# Smallest normal float32: keeps the division finite however small the temperature.
_MIN_TEMPERATURE = torch.finfo(torch.float32).tiny
# From this share of the vocabulary on (1/64), sorting all of it takes less time on a CPU than picking the highest.
_SHARE_WORTH_SORTING = 64


def keep_allowed(logits: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    """Keep at these positions the tokens that a grammar allows. The rest gets -inf.

    Args:
        logits: [T, V] float32.
        positions: [N] int64, none twice.
        masks: [N, K] uint8 with 8 * K >= V: bit v % 8 of byte v // 8 tells whether token v is allowed.
    """
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (masks[:, :, None] >> bits).bitwise_and_(1).bool().flatten(1)[:, : logits.shape[-1]]
    return logits.index_copy(0, positions, logits.index_select(0, positions).masked_fill_(~allowed, -torch.inf))


def add_bias(logits: Tensor, positions: Tensor, token_ids: Tensor, values: Tensor) -> Tensor:
    """Add values[i] to logits[positions[i], token_ids[i]] (OpenAI logit_bias).

    Args:
        logits: [T, V] float32.
        positions, token_ids: [N] int64, no pair twice.
        values: [N] float32.
    """
    return logits.index_put((positions, token_ids), values, accumulate=True)


def suppress(logits: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Make token_ids[i] impossible at positions[i]; used for the tokens that end an output before min_tokens.

    Args:
        logits: [T, V] float32.
        positions, token_ids: [N] int64.
    """
    return logits.index_put((positions, token_ids), logits.new_full((), -torch.inf))


def penalize_output(logits: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """logit - count * frequency - (count > 0) * presence (OpenAI API reference).

    Args:
        logits: [T, K] float32, of any K tokens.
        counts: [T, K] float32, how often the output before the position has each of these tokens.
        presence, frequency: [T] float32.
    """
    return logits - counts * frequency[:, None] - (counts > 0) * presence[:, None]


def penalize_repetition(logits: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """Divide a positive and multiply a negative logit by the penalty where the token was seen (arXiv:1909.05858, 4.1).

    The paper divides all logits, which would favour seen tokens of a negative logit; the split by sign is the
    convention of Hugging Face transformers.

    Args:
        logits: [T, K] float32, of any K tokens.
        counts: [T, K] float32, how often prompt and output before the position have each of these tokens.
        penalty: [T] float32, > 0.
    """
    factor = penalty[:, None]
    return torch.where(counts > 0, torch.where(logits > 0, logits / factor, logits * factor), logits)


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logit[v] - max logit) / temperature; the shift changes no probability and keeps the quotient from +inf.

    Args:
        logits: [T, V] float32.
        temperature: [T] float32, > 0.
    """
    return (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=_MIN_TEMPERATURE)[:, None]


def keep_top_k(logits: Tensor, top_k: Tensor, max_top_k: int) -> Tensor:
    """Keep exactly the top_k likeliest tokens (all where top_k >= V); equal ones by token id. The rest gets -inf.

    Args:
        logits: [T, V] float32.
        top_k: [T] int64, >= 1.
        max_top_k: the largest of top_k, known to the host.
    """
    count = min(max_top_k, logits.shape[-1])
    kept = _is_among_highest(logits, _highest(logits, count), top_k.clamp(max=count))
    return torch.where(kept, logits, -torch.inf)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keep the smallest set of likeliest tokens of probability >= top_p (arXiv:1904.09751, 3.1). The rest gets -inf.

    With p_1 >= p_2 >= ... (equal ones by token id) the first 1 + #{i: p_1 + ... + p_i < top_p} tokens are kept.

    Args:
        logits: [T, V] float32.
        top_p: [T] float32, in (0, 1].
    """
    probabilities = logits.softmax(-1)
    ordered = _highest(probabilities, logits.shape[-1])
    # Summed in float64: in float32 the sum of a large vocabulary would drift by more than the rarest tokens weigh.
    cumulative = ordered.cumsum(-1, dtype=torch.float64)
    num_below = torch.searchsorted(cumulative, top_p[:, None].double()).squeeze(-1)
    num_kept = (num_below + 1).clamp(max=logits.shape[-1])
    return torch.where(_is_among_highest(probabilities, ordered, num_kept), logits, -torch.inf)


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Keep tokens of probability >= min_p * that of the likeliest (arXiv:2407.01082). The rest gets -inf.

    Args:
        logits: [T, V] float32.
        min_p: [T] float32, in (0, 1].
    """
    floor = logits.amax(-1, keepdim=True) + min_p.log()[:, None]
    return torch.where(logits >= floor, logits, -torch.inf)


def _highest(values: Tensor, count: int) -> Tensor:
    """The highest values of each row, descending; [T, V] float32 -> [T, count]."""
    if count * _SHARE_WORTH_SORTING < values.shape[-1]:
        return values.topk(count).values
    if values.device.type == "cpu":
        # numpy sorts floats with vector instructions, torch does not: 0.09 against 3.2 ms for 49152 values.
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)[:, :count]
    return values.sort(-1, descending=True).values[:, :count]


def _is_among_highest(values: Tensor, ordered: Tensor, num_kept: Tensor) -> Tensor:
    """Mark the num_kept highest values of each row; among equal ones the lowest indices.

    Args:
        values: [T, V] float32.
        ordered: [T, K] float32, the K highest values of each row, descending.
        num_kept: [T] int64 in 1..K.

    Returns:
        [T, V] bool, num_kept true values in each row.
    """
    boundary = ordered.gather(1, num_kept[:, None] - 1)
    num_above = torch.searchsorted(-ordered, -boundary)
    tied = values == boundary
    tied_kept = tied & (tied.cumsum(-1, dtype=torch.int32) <= num_kept[:, None] - num_above)
    return (values > boundary).logical_or_(tied_kept)
