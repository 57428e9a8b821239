"""Steps padded to buckets give the logits of steps at their own size."""

import random

import pytest
import torch
from torch import Tensor

from cllm_core.backends.cuda.static_steps import Buckets, NotRecordable, StaticSteps, Work
from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.step_tables import StepShape, StepTables, pack_tables
from cllm_core.models.paged import RowSpan
from tests.architectures import Architecture
from tests.backends.step_rows import random_rows
from tests.backends.table_attention import attend_plainly
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE
from tests.engine.factories import paged_model

NUM_BLOCKS, BLOCK_SIZE = 64, 4
BUCKETS = Buckets.of(max_rows=6, max_tokens=48)


class Recordings:
    """Repeats work by doing it again; counts."""

    def __init__(self) -> None:
        self.num_recorded = self.num_repeated = 0

    def __call__(self, work: Work) -> Work:
        self.num_recorded += 1
        work()

        def repeat() -> None:
            self.num_repeated += 1
            work()

        return repeat


def refuse(work: Work) -> Work:
    raise NotRecordable("not here")


def plain(architecture: Architecture) -> PagedModel:
    """Attends by gathering, at the steps' own sizes: the reference."""
    model = PagedModel(paged_model(architecture))
    model.allocate_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return model


def by_tables(architecture: Architecture) -> PagedModel:
    model = PagedModel(paged_model(architecture))
    model.use_attention(attend_plainly)
    model.allocate_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return model


def static(architecture: Architecture, recordings: Recordings) -> PagedModel:
    model = by_tables(architecture)
    model.use_static_steps(recordings, buckets=BUCKETS, max_model_len=NUM_BLOCKS * BLOCK_SIZE)
    return model


def step_of(rows: list[RowSpan], draw: random.Random) -> tuple[Tensor, Tensor, list[RowSpan], Tensor]:
    """Random tokens for the rows; the predictions of some are wanted."""
    num_tokens = sum(row.num_tokens for row in rows)
    ids = torch.tensor([draw.randrange(VOCAB_SIZE) for _ in range(num_tokens)])
    positions = torch.cat([torch.arange(row.first_position, row.context_length) for row in rows])
    sampled = torch.tensor(sorted(draw.sample(range(num_tokens), draw.randint(1, num_tokens))))
    return ids, positions, rows, sampled


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_steps_in_buckets_equal_plain_steps(architecture: Architecture) -> None:
    draw = random.Random(3)
    recordings = Recordings()
    models = [plain(architecture), by_tables(architecture), static(architecture, recordings)]
    for _ in range(12):
        num_rows = draw.randint(1, 6)
        rows = random_rows(draw, num_rows=num_rows, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, longest=8)
        step = step_of(rows, draw)
        expected, *found = [model.forward(*step).clone() for model in models]
        for logits in found:
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert recordings.num_recorded + recordings.num_repeated == 12


def test_a_shape_is_recorded_once() -> None:
    recordings, draw = Recordings(), random.Random(4)
    model = static("llama", recordings)
    for num_tokens in (5, 6, 8, 7):
        model.forward(*step_of([RowSpan(0, num_tokens, 0, (1, 2))], draw))
    assert (recordings.num_recorded, recordings.num_repeated) == (1, 3)


def test_a_step_beyond_the_largest_bucket_runs_at_its_own_size() -> None:
    recordings, draw = Recordings(), random.Random(5)
    step = step_of([RowSpan(0, 49, 0, tuple(range(13)))], draw)
    logits = static("mistral", recordings).forward(*step)
    assert recordings.num_recorded == 0
    torch.testing.assert_close(logits, plain("mistral").forward(*step), atol=2e-4, rtol=1e-4)


def test_padding_never_writes_to_a_block_of_a_text() -> None:
    draw = random.Random(6)
    model = static("llama", Recordings())
    cache = model._cache
    assert cache is not None
    model.forward(*step_of([RowSpan(0, 5, 0, (7, 3))], draw))  # padded to 8
    written = {block for block in range(cache.num_blocks) if cache.keys[0][block].any()}
    assert written == {7, 3, NUM_BLOCKS}
    assert not cache.keys[0][3, 1:].any()


def test_a_model_that_cannot_be_recorded_runs_on(caplog: pytest.LogCaptureFixture) -> None:
    model = by_tables("qwen2")
    model.use_static_steps(refuse, buckets=BUCKETS, max_model_len=64)
    step = step_of([RowSpan(0, 5, 0, (7, 3))], random.Random(7))
    for _ in range(2):
        torch.testing.assert_close(model.forward(*step), plain("qwen2").forward(*step), atol=2e-4, rtol=1e-4)
    assert [record.getMessage() for record in caplog.records] == [
        "steps run without being recorded from now on: not here"
    ]


@pytest.mark.parametrize(
    ("max_rows", "max_tokens", "step", "expected"),
    [
        (64, 1024, (1, 1), (1, 1)),
        (64, 1024, (3, 5), (4, 8)),
        (64, 1024, (33, 33), (64, 64)),
        (48, 1024, (33, 100), (48, 128)),
        (64, 1024, (2, 513), None),
        (64, 40, (5, 33), (8, 40)),
        (64, 40, (41, 41), None),
    ],
)
def test_a_step_gets_the_smallest_bucket_it_fits(
    max_rows: int, max_tokens: int, step: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    buckets = Buckets.of(max_rows=max_rows, max_tokens=max_tokens)
    assert buckets.fit(*step) == (None if expected is None else StepShape(*expected))


def test_buckets_are_few_and_all_can_be_reached() -> None:
    buckets = Buckets.of(max_rows=64, max_tokens=1024)
    reached = {buckets.fit(rows, tokens) for rows in range(1, 65) for tokens in range(rows, 513)}
    assert len(reached) == buckets.count < 100


def test_the_buffers_take_what_is_reserved_for_them() -> None:
    model = static("llama", Recordings())
    found = model._static
    assert isinstance(found, StaticSteps)
    tensors = (found._input_ids, found._positions, found._sampled, found._tables, found._logits)
    expected = StaticSteps.num_bytes(BUCKETS, max_row_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE)
    assert sum(tensor.nbytes for tensor in tensors) == expected


def test_tables_name_slots_and_blocks_of_each_row() -> None:
    rows = [RowSpan(0, 2, 3, (9, 4, 5)), RowSpan(2, 1, 0, (6,))]
    packed = pack_tables(rows, StepShape(3, 5), block_size=4, scratch_block=10)
    tables = StepTables.view(torch.from_numpy(packed), StepShape(3, 5))
    assert tables.query_starts.tolist() == [0, 2, 3, 5, 5]
    assert tables.context_lengths.tolist() == [5, 1, 0, 0]
    assert tables.block_starts.tolist()[:2] == [0, 2]
    assert tables.write_slots.tolist() == [9 * 4 + 3, 4 * 4, 6 * 4, 40, 40]
    assert tables.block_ids.tolist() == [9, 4, 6]
