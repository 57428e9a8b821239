"""Attention over tables, token by token, as plainly as it can be written."""

import torch
from torch import Tensor

from cllm_core.backends.step_tables import StepTables
from cllm_core.models.attention import Scoring


def attend_plainly(query: Tensor, keys: Tensor, values: Tensor, tables: StepTables, scoring: Scoring) -> Tensor:
    """See TableAttention."""
    out = query.new_zeros(len(query), query.shape[1], values.shape[-1])
    repeat = query.shape[1] // keys.shape[2]
    for row in range(tables.num_rows):
        start, end = tables.query_starts[row : row + 2].tolist()
        length, first_block = int(tables.context_lengths[row]), int(tables.block_starts[row])
        if length == 0 or start == end:
            continue
        gap = int(tables.gaps[row])
        blocks = tables.block_ids[first_block : first_block - (-(length + gap) // keys.shape[1])].long()
        slots = [*range(length - (end - start)), *range(length - (end - start) + gap, length + gap)]
        row_keys = keys[blocks].flatten(0, 1)[slots].repeat_interleave(repeat, dim=1)
        row_values = values[blocks].flatten(0, 1)[slots].repeat_interleave(repeat, dim=1)
        positions = torch.arange(length, device=query.device)
        behind = positions[length - (end - start) :, None] - positions
        hidden = (behind < 0) if scoring.window is None else (behind < 0) | (behind >= scoring.window)
        scores = torch.einsum("qhd,khd->hqk", query[start:end], row_keys) * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        if scoring.slopes is not None:
            scores = scores - behind * scoring.slopes[:, None, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        if scoring.sinks is not None:
            scores = torch.cat((scores, scoring.sinks[:, None, None].expand(-1, end - start, 1)), dim=-1)
        weights = scores.softmax(-1)[..., :length]
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, row_values)
    return out
