"""The Triton kernels against attention written plainly, for shapes of all kinds."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cllm_core.backends.cuda.attention import KernelAttention, attention_gap, tile_size, trial_error
from cllm_core.backends.step_tables import StepShape, StepTables, pack_tables
from cllm_core.models.attention import Scoring
from cllm_core.models.paged import LayerSpec, RowSpan
from tests.backends.step_rows import random_rows
from tests.backends.table_attention import attend_plainly

NUM_BLOCKS = 48


@dataclass(frozen=True)
class Case:
    """Heads, sizes, and a device of so many processors, which decides into how many parts contexts are split."""

    num_heads: int = 2
    num_kv_heads: int = 1
    key_size: int = 16
    value_size: int = 16
    block_size: int = 4
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    num_processors: int = 1
    dtype: torch.dtype = torch.float32
    is_strided: bool = False  # the queries' elements do not lie side by side


CASES = [
    Case(),
    Case(num_heads=3, num_kv_heads=1, key_size=24, value_size=8, block_size=5, window=7),
    Case(num_processors=16),
    Case(num_processors=12, window=3, block_size=16),
    Case(num_heads=20, num_kv_heads=1, dtype=torch.float16, num_processors=8),
    # The interpreter has no matrix product in bfloat16.
    pytest.param(Case(4, 2, 128, 128, dtype=torch.bfloat16, num_processors=132), marks=pytest.mark.gpu),
    Case(num_heads=1, num_kv_heads=1, key_size=160, value_size=160),
    Case(is_strided=True),
    Case(softcap=1.5),
    Case(has_sinks=True),
    Case(num_heads=6, num_kv_heads=2, window=5, softcap=20.0, has_sinks=True, num_processors=12),
    Case(has_sinks=True, num_processors=16, dtype=torch.float16),
]


def attend(case: Case, rows: list[RowSpan], shape: StepShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """By the kernels and plainly, from the same random queries, keys and values."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, case.dtype)

    packed = pack_tables(rows, shape, block_size=case.block_size, scratch_block=NUM_BLOCKS)
    tables = StepTables.view(torch.from_numpy(packed).to(device), shape)
    # As transformers hands them over: heads before tokens in memory.
    query = draw(case.num_heads, shape.num_tokens, case.key_size).transpose(0, 1)
    if case.is_strided:
        query = query.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    keys = draw(NUM_BLOCKS + 1, case.block_size, case.num_kv_heads, case.key_size)
    values = draw(NUM_BLOCKS + 1, case.block_size, case.num_kv_heads, case.value_size)
    sinks = torch.linspace(-2, 4, case.num_heads, device=device) if case.has_sinks else None
    scoring = Scoring(case.key_size**-0.5, case.window, case.softcap, sinks)
    found = KernelAttention(case.num_processors)(query, keys, values, tables, scoring)
    exact = attend_plainly(query.float(), keys.float(), values.float(), tables, scoring)
    assert found.dtype == case.dtype
    return found.float(), exact


def tolerance(case: Case) -> float:
    return 1e-5 if case.dtype == torch.float32 else 2e-2


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_plain_attention(case: Case, kernel_device: torch.device) -> None:
    rows = random_rows(random.Random(1), num_rows=3, num_blocks=NUM_BLOCKS, block_size=case.block_size)
    shape = StepShape(3, sum(row.num_tokens for row in rows))
    found, exact = attend(case, rows, shape, kernel_device)
    torch.testing.assert_close(found, exact, atol=tolerance(case), rtol=tolerance(case))


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_where_rows_have_gaps(case: Case, kernel_device: torch.device) -> None:
    draw = random.Random(4)
    rows = random_rows(draw, num_rows=3, num_blocks=NUM_BLOCKS, block_size=case.block_size, longest_gap=30)
    assert any(row.gap for row in rows)
    shape = StepShape(3, sum(row.num_tokens for row in rows))
    found, exact = attend(case, rows, shape, kernel_device)
    torch.testing.assert_close(found, exact, atol=tolerance(case), rtol=tolerance(case))


@pytest.mark.parametrize("num_processors", [1, 12])
def test_padding_gets_zeros_and_changes_nothing(num_processors: int, kernel_device: torch.device) -> None:
    rows = random_rows(random.Random(2), num_rows=2, num_blocks=NUM_BLOCKS, block_size=4)
    num_tokens = sum(row.num_tokens for row in rows)
    found, exact = attend(Case(num_processors=num_processors), rows, StepShape(4, num_tokens + 6), kernel_device)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)
    assert not found[num_tokens:].any()


def test_a_row_of_many_query_tokens_is_cut_into_tiles(kernel_device: torch.device) -> None:
    rows = [RowSpan(0, 1, 9, (3, 1, 2)), RowSpan(1, 75, 20, tuple(range(4, 28)))]
    # 32 queries of 2 heads, and 8 of them
    assert (tile_size(76, 3, 2, is_float32=False), tile_size(76, 3, 2, is_float32=True)) == (64, 16)
    for case in (Case(dtype=torch.float16), Case()):
        found, exact = attend(case, rows, StepShape(2, 76), kernel_device)
        torch.testing.assert_close(found, exact, atol=tolerance(case), rtol=tolerance(case))


def test_tiles_of_float32_grow_only_with_the_heads_that_share_keys() -> None:
    """Larger ones spilt their registers: 7 KB a thread for 64 rows of heads of 128."""
    for num_tokens, repeat in ((1, 1), (512, 4), (2048, 16)):
        assert tile_size(num_tokens, 1, repeat, is_float32=True) == 16
    assert tile_size(512, 1, 20, is_float32=True) == 32


def without_compiler(*_: object, **__: object) -> Tensor:
    raise FileNotFoundError("gcc")


def test_kernels_that_cannot_be_compiled_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    layers, cpu = [LayerSpec(2, 16, 8)], torch.device("cpu")
    assert trial_error(attend_plainly, layers, torch.float32, cpu) is None
    assert trial_error(without_compiler, layers, torch.float32, cpu) == "the kernels cannot be used: gcc"


def test_kernels_are_for_cuda_only() -> None:
    gap = attention_gap([LayerSpec(1, 16, 16)], torch.float32, torch.device("cpu"))
    assert gap == "the kernels are for CUDA, the model is on cpu"
