"""Log-probabilities of tokens, from the raw logits: before temperature, bias and penalties.

They travel to the host as integers, ids and the bits of floats side by side, so that they can share one copy.
"""

import numpy as np
import torch
from torch import Tensor

from cllm_core.request import TokenLogprobs

# A softmax takes as much memory as the logits it is of; a prompt chunk may have hundreds of rows of them.
_CHUNK_ROWS = 64


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


def pack_logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> Tensor:
    """Per position: log-probability of the chosen token, those of the top tokens, and their ids.

    Args:
        logits, chosen, num_top: as in compute_logprobs.

    Returns:
        [T, 1 + 2 * num_top] int64; floats as the bits of float64.
    """
    chunks = zip(logits.split(_CHUNK_ROWS), chosen.split(_CHUNK_ROWS), strict=True)
    return torch.cat([_pack(rows, tokens, num_top) for rows, tokens in chunks])


def unpack_logprobs(values: np.ndarray, num_wanted: int) -> tuple[TokenLogprobs, ...]:
    """Inverse of pack_logprobs, for [T, 1 + 2 * num_top] int64 on the host, cut to the alternatives wanted."""
    num_top = (values.shape[1] - 1) // 2
    floats = values[:, : 1 + num_top].copy().view(np.float64)
    top_ids = values[:, 1 + num_top : 1 + num_top + num_wanted]
    return tuple(
        TokenLogprobs(logprob=own, top_ids=tuple(ids), top_logprobs=tuple(tops[:num_wanted]))
        for (own, *tops), ids in zip(floats.tolist(), top_ids.tolist(), strict=True)
    )


def _pack(logits: Tensor, chosen: Tensor, num_top: int) -> Tensor:
    logprob, top_ids, top_logprobs = compute_logprobs(logits, chosen, num_top)
    floats = torch.cat([logprob[:, None], top_logprobs], dim=1).double().view(torch.long)
    return torch.cat([floats, top_ids], dim=1)
