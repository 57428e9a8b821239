"""Scores with window, softcap and sinks: the paged cache in plain torch, against attention token by token."""

import random

import pytest
import torch

from cllm_core.backends.cpu.coverage import attention_gap
from cllm_core.backends.step_tables import StepShape, StepTables, pack_tables
from cllm_core.models.attention import ALIBI, SINKS, SOFTCAP, Scoring
from cllm_core.models.paged import KVCache, LayerSpec, PagedStep
from tests.backends.step_rows import random_rows
from tests.backends.table_attention import attend_plainly

NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, SIZE = 32, 4, 6, 2, 16
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.7])
HEAD_SINKS = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, 4.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, HEAD_SINKS], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["no slopes", "slopes"])
def test_scores_of_every_kind_agree_with_attention_token_by_token(
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    rows = random_rows(random.Random(3), num_rows=5, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    num_tokens = sum(row.num_tokens for row in rows)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    spec = LayerSpec(NUM_KV_HEADS, SIZE, SIZE)
    cache = KVCache([spec], num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=dtype, device=torch.device("cpu"))
    for stored in (cache.keys[0], cache.values[0]):
        stored.copy_(draw(*stored.shape))
    query, key, value = draw(num_tokens, NUM_HEADS, SIZE), draw(num_tokens, 2, SIZE), draw(num_tokens, 2, SIZE)
    scoring = Scoring(SIZE**-0.5, window, softcap, None if sinks is None else sinks.to(dtype), slopes)
    found = PagedStep(cache, rows, torch.device("cpu")).attend(0, query, key, value, scoring)

    packed = pack_tables(rows, StepShape(len(rows), num_tokens), block_size=BLOCK_SIZE, scratch_block=0)
    tables = StepTables.view(torch.from_numpy(packed), StepShape(len(rows), num_tokens))
    exact = Scoring(SIZE**-0.5, window, softcap, sinks, slopes)
    expected = attend_plainly(query.float(), cache.keys[0].float(), cache.values[0].float(), tables, exact)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_kernels_give_way_where_they_lack_a_feature() -> None:
    layers = [LayerSpec(2, 64, 64), LayerSpec(2, 64, 64, (ALIBI,))]
    assert attention_gap(layers, torch.bfloat16, block_size=16) == "the C kernels have no ALiBi"
    assert attention_gap(layers[:1], torch.bfloat16, block_size=16) is None
    assert attention_gap([LayerSpec(2, 64, 64, (SOFTCAP, SINKS))], torch.bfloat16, block_size=16) is None
