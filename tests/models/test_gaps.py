"""A row with a gap computes what the same row computes in a cache where its tokens follow what it sees at once."""

import random

import pytest
import torch

from cllm_core.models.attention import Scoring
from cllm_core.models.paged import KVCache, LayerSpec, PagedStep, RowSpan

BLOCK_SIZE, NUM_HEADS, SIZE = 4, 4, 8
SCORINGS = [
    Scoring(0.3),
    Scoring(0.3, window=6),
    Scoring(0.3, window=2),
    Scoring(0.3, softcap=2.0),
    Scoring(0.3, slopes=torch.linspace(0.1, 0.4, NUM_HEADS)),
]


def make_cache() -> KVCache:
    specs = [LayerSpec(2, SIZE, SIZE)]
    return KVCache(specs, num_blocks=40, block_size=BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))


def write(cache: KVCache, blocks: tuple[int, ...], slots: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
    places = [blocks[slot // BLOCK_SIZE] * BLOCK_SIZE + slot % BLOCK_SIZE for slot in slots]
    cache.keys[0].flatten(0, 1)[places] = keys
    cache.values[0].flatten(0, 1)[places] = values


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("seed", range(4))
def test_what_lies_in_a_gap_is_not_seen(scoring: Scoring, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, plain_rows, first_index = [], [], 0
    cache, plain_cache = make_cache(), make_cache()
    cache.keys[0].normal_(), cache.values[0].normal_()  # garbage in the gaps
    for number in range(3):
        blocks = tuple(range(10 * number, 10 * number + 10))
        num_tokens, first_position, gap = draw.randint(1, 5), draw.randint(0, 20), draw.randint(0, 12)
        before = torch.randn(2, first_position, 2, SIZE)
        for target in (cache, plain_cache):
            write(target, blocks, list(range(first_position)), *before)
        rows.append(RowSpan(first_index, num_tokens, first_position, blocks, gap=gap))
        plain_rows.append(RowSpan(first_index, num_tokens, first_position, blocks))
        first_index += num_tokens
    query = torch.randn(first_index, NUM_HEADS, SIZE)
    key, value = torch.randn(2, first_index, 2, SIZE)
    found, expected = (
        PagedStep(target, spans, torch.device("cpu")).attend(0, query, key, value, scoring)
        for target, spans in ((cache, rows), (plain_cache, plain_rows))
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_rows_of_one_text_see_the_same_beginning_and_not_each_other() -> None:
    """Two continuations of one text in one step, with other tokens at the same positions."""
    blocks = tuple(range(10))
    cache = make_cache()
    query = torch.randn(9, NUM_HEADS, SIZE)
    key, value = torch.randn(2, 9, 2, SIZE)
    rows = [RowSpan(0, 5, 0, blocks), RowSpan(5, 2, 3, blocks, gap=2), RowSpan(7, 2, 5, blocks, gap=2)]
    together = PagedStep(cache, rows, torch.device("cpu")).attend(0, query, key, value, Scoring(0.3))
    for row in rows[1:]:
        index = [*range(row.first_position), *range(row.first_index, row.first_index + 2)]
        spans = [RowSpan(0, len(index), 0, blocks)]
        alone = PagedStep(make_cache(), spans, torch.device("cpu")).attend(
            0, query[index], key[index], value[index], Scoring(0.3)
        )
        own = slice(row.first_index, row.first_index + 2)
        torch.testing.assert_close(together[own], alone[-2:], atol=1e-5, rtol=1e-5)
