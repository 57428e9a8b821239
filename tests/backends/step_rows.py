"""Random steps over a paged cache: rows of mixed lengths, in blocks of random order."""

import random

from cllm_core.models.paged import RowSpan


def random_rows(
    draw: random.Random, *, num_rows: int, num_blocks: int, block_size: int, longest: int = 9, longest_gap: int = 0
) -> list[RowSpan]:
    """Rows of 1 to `longest` query tokens behind contexts that together, with their gaps, fill at most the blocks."""
    free = draw.sample(range(num_blocks), num_blocks)
    most = num_blocks // num_rows * block_size
    rows, first_index = [], 0
    for _ in range(num_rows):
        num_tokens = draw.randint(1, longest)
        first_position = draw.randint(0, most - num_tokens)
        gap = draw.randint(0, min(longest_gap, most - num_tokens - first_position))
        num_needed = -(-(first_position + gap + num_tokens) // block_size)
        blocks = tuple(free.pop() for _ in range(num_needed))
        rows.append(RowSpan(first_index, num_tokens, first_position, blocks, gap=gap))
        first_index += num_tokens
    return rows
