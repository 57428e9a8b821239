"""Steps padded to buckets give the logits of steps at their own size."""

import random

import pytest
import torch
from torch import Tensor

from cllm_core.backends.cuda import graphed_model
from cllm_core.backends.cuda.graphed_model import GraphedModel
from cllm_core.backends.cuda.static_steps import Buckets, Capture, NotCapturable, StaticSteps, Work
from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.step_tables import StepShape, StepTables, pack_tables
from cllm_core.models.paged import RowSpan
from tests.architectures import Architecture
from tests.backends import factories
from tests.backends.step_rows import random_rows
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE
from tests.engine.factories import paged_model

NUM_BLOCKS, BLOCK_SIZE = 64, 4
BUCKETS = Buckets.of(max_rows=6, max_tokens=48)


class Captures:
    """Repeats work by doing it again; counts."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, work: Work) -> Work:
        self.num_captured += 1
        work()

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay


def refuse(work: Work) -> Work:
    raise NotCapturable("not here")


def plain(architecture: Architecture) -> PagedModel:
    model = factories.plain(paged_model(architecture))
    model.allocate_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return model


def by_tables(architecture: Architecture) -> PagedModel:
    model = factories.by_tables(paged_model(architecture))
    model.allocate_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return model


def static(
    architecture: Architecture, capture: Capture, *, max_model_len: int = NUM_BLOCKS * BLOCK_SIZE
) -> GraphedModel:
    model = factories.graphed(paged_model(architecture), capture, BUCKETS)
    model.allocate_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    model.enable_graphs(max_model_len=max_model_len)
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
    captures = Captures()
    models = [plain(architecture), by_tables(architecture), static(architecture, captures)]
    for _ in range(12):
        num_rows = draw.randint(1, 6)
        rows = random_rows(draw, num_rows=num_rows, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, longest=8)
        step = step_of(rows, draw)
        expected, *found = [model.forward(*step).clone() for model in models]
        for logits in found:
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert captures.num_captured + captures.num_replayed == 12


def test_a_shape_is_captured_once() -> None:
    captures, draw = Captures(), random.Random(4)
    model = static("llama", captures)
    for num_tokens in (5, 6, 8, 7):
        model.forward(*step_of([RowSpan(0, num_tokens, 0, (1, 2))], draw))
    assert (captures.num_captured, captures.num_replayed) == (1, 3)


def test_a_step_beyond_the_largest_bucket_runs_at_its_own_size() -> None:
    captures, draw = Captures(), random.Random(5)
    step = step_of([RowSpan(0, 49, 0, tuple(range(13)))], draw)
    logits = static("mistral", captures).forward(*step)
    assert captures.num_captured == 0
    torch.testing.assert_close(logits, plain("mistral").forward(*step), atol=2e-4, rtol=1e-4)


def test_padding_never_writes_to_a_block_of_a_text() -> None:
    draw = random.Random(6)
    model = static("llama", Captures())
    cache = model._cache
    assert cache is not None
    model.forward(*step_of([RowSpan(0, 5, 0, (7, 3))], draw))  # padded to 8
    written = {block for block in range(cache.num_blocks) if cache.keys[0][block].any()}
    assert written == {7, 3, NUM_BLOCKS}
    assert not cache.keys[0][3, 1:].any()


def test_a_model_that_cannot_be_captured_runs_on(caplog: pytest.LogCaptureFixture) -> None:
    model = static("qwen2", refuse, max_model_len=64)
    step = step_of([RowSpan(0, 5, 0, (7, 3))], random.Random(7))
    for _ in range(2):
        torch.testing.assert_close(model.forward(*step), plain("qwen2").forward(*step), atol=2e-4, rtol=1e-4)
    assert [record.getMessage() for record in caplog.records] == ["steps run without CUDA graphs from now on: not here"]
    assert str(model.paths.graphs) == "none (not here)"


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
    model = static("llama", Captures())
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


def test_a_capture_that_runs_out_of_memory_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to turn graphs off for good."""
    monkeypatch.setattr(graphed_model, "_PAUSED_STEPS", 3)
    counting, num_failed = Captures(), [0]

    def capture(work: Work) -> Work:
        if not num_failed[0]:
            num_failed[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return counting(work)

    model, reference = static("qwen2", capture), plain("qwen2")
    draw = random.Random(3)
    for number in range(5):
        step = step_of([RowSpan(0, 2, 0, (0,))], draw)
        torch.testing.assert_close(model.forward(*step), reference.forward(*step), atol=2e-4, rtol=1e-4)
        assert model.num_graphs == (number >= 3)
    assert model.may_capture
