"""Unrolled drafts: the model in training goes on with its noisy blocks itself before it learns from them.

What decoding meets are not random tokens but the model's own earlier predictions. As a block's tokens keep their
places, a Jacobi iteration only replaces ids: positions, masks and targets of the pack stay as they are. ::

    clean answer    y3   y4   y5   y6
    block           d0   d1   d2            d0 != y3; it predicts p0 p1 p2 for the places of y4 y5 y6
    one iteration   y3   p0   p1            the first wrong token becomes right, as AR would set it
"""

from dataclasses import replace

import torch
from torch import Tensor

from cllm_core.training.packing import PackLayout


def advance_drafts(layout: PackLayout, predicted_ids: Tensor, chosen: Tensor) -> PackLayout:
    """The pack after a Jacobi iteration of the chosen blocks.

    Args:
        layout: of the pack.
        predicted_ids: [R] int64, the model's token for each row.
        chosen: [number of blocks] bool, in the order of the pack.
    """
    rows = (layout.teacher_rows >= 0).nonzero().squeeze(1)
    tokens = layout.row_index[rows]
    clean_ids = layout.target_ids[layout.teacher_rows[rows] - 1]
    wrong = layout.input_ids[tokens] != clean_ids
    settled = _count_in_block(wrong, _block_index(layout, tokens)) == wrong  # nothing wrong before the token
    advanced = torch.where(settled, clean_ids, predicted_ids[rows - 1])
    input_ids = layout.input_ids.clone()
    input_ids[tokens] = torch.where(chosen[_block_index(layout, tokens)], advanced, input_ids[tokens])
    return replace(layout, input_ids=input_ids)


def learning_depths(layout: PackLayout) -> Tensor:
    """[R] int64: tokens from the first wrong token of the row's block up to the row's own, both counted.

    0 where the row sees no wrong token: clean rows, and those of blocks that predict what the clean answer does.
    """
    is_draft = layout.teacher_rows >= 0
    tokens = layout.row_index[is_draft]
    blocks = _block_index(layout, tokens)
    wrong = layout.input_ids[tokens] != layout.target_ids[layout.teacher_rows[is_draft] - 1]
    depths = torch.zeros_like(layout.teacher_rows)
    depths[is_draft] = _count_in_block(_count_in_block(wrong, blocks) > 0, blocks)
    return depths


def count_blocks(layout: PackLayout) -> int:
    """Noisy blocks in the pack."""
    tokens = layout.row_index[layout.teacher_rows >= 0]
    return int((layout.position_ids[tokens] == layout.starts[tokens]).sum())


def _block_index(layout: PackLayout, tokens: Tensor) -> Tensor:
    """[D] index of the block that each draft token belongs to."""
    return (layout.position_ids[tokens] == layout.starts[tokens]).cumsum(dim=0) - 1


def _count_in_block(flags: Tensor, block_index: Tensor) -> Tensor:
    """[D] flags set in the block up to and including each token."""
    counts = flags.cumsum(dim=0)
    is_first = torch.ones_like(flags)
    is_first[1:] = block_index[1:] != block_index[:-1]
    before_block = (counts - flags.long())[is_first]
    return counts - before_block[block_index]
