"""The Scheduler alone: plans are made by it, results are made up here, no tensor and no model is involved."""

import random
from collections.abc import Sequence

import msgspec
import pytest

from cllm_core.engine.block_pool import BlockPool
from cllm_core.engine.draft_length import DraftLengths
from cllm_core.engine.plan import PlannedRow, RowResult, StepPlan, StepResult
from cllm_core.engine.request_state import RequestState
from cllm_core.engine.scheduler import Scheduler
from cllm_core.engine.step_times import StepTimes
from cllm_core.request import RequestOutput, TokenLogprobs
from tests.engine.factories import make_request

BLOCK_SIZE = 4
STOP = 9
WORD = 5


def make_scheduler(
    *,
    num_blocks: int = 100,
    num_seqs: int = 4,
    budget: int = 64,
    caching: bool = False,
    step_times: StepTimes | None = None,
    prefill_step_seconds: float = 0.0,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE, prefix_caching=caching),
        max_num_seqs=num_seqs,
        max_batched_tokens=budget,
        step_times=step_times,
        prefill_step_seconds=prefill_step_seconds,
    )


def make_state(
    request_id: str, num_prompt: int, *, block_length: int = 4, max_tokens: int = 100, wants_draft: bool = False
) -> RequestState:
    request = make_request(request_id, range(100, 100 + num_prompt))
    return RequestState(
        request=msgspec.structs.replace(request, wants_draft=wants_draft),
        seed=0,
        block_length=block_length,
        max_tokens=max_tokens,
        stop_token_ids=frozenset({STOP}),
    )


def accept(plan: StepPlan, num_accepted: int = 1) -> StepResult:
    """As if the model had confirmed up to this many tokens of every window."""
    return StepResult(tuple(row_result((WORD,) * min(num_accepted, row.num_sampled)) for row in plan.rows))


def row_result(accepted_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] | None = None) -> RowResult:
    return RowResult(predicted_ids=accepted_ids, num_accepted=len(accepted_ids), logprobs=logprobs)


def step(scheduler: Scheduler, num_accepted: int = 1) -> tuple[StepPlan, list[RequestOutput]]:
    plan = scheduler.schedule()
    outputs = scheduler.commit(plan, accept(plan, num_accepted))
    scheduler.check()
    return plan, outputs


def add(scheduler: Scheduler, *states: RequestState) -> None:
    for state in states:
        scheduler.add(state)


def shape(row: PlannedRow) -> tuple[str, int, int, int]:
    return row.request_id, row.first_position, row.num_tokens, row.num_sampled


def ids(rows: Sequence[PlannedRow]) -> list[str]:
    return [row.request_id for row in rows]


def test_a_prompt_that_fits_carries_the_first_draft_along() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_state("a", 10))
    plan, _ = step(scheduler)
    assert [shape(row) for row in plan.rows] == [("a", 0, 10 + 3, 4)]
    assert plan.rows[0].last_accepted_position == 9


def test_a_long_prompt_is_read_in_chunks_and_the_last_one_carries_what_draft_fits() -> None:
    scheduler = make_scheduler(budget=6)
    add(scheduler, make_state("a", 16))
    shapes = [shape(step(scheduler)[0].rows[0]) for _ in range(4)]
    assert shapes == [("a", 0, 6, 0), ("a", 6, 6, 0), ("a", 12, 6, 3), ("a", 16, 4, 4)]


def test_a_chunk_that_ends_with_the_prompt_samples_one_token() -> None:
    scheduler = make_scheduler(budget=6)
    add(scheduler, make_state("a", 12))
    shapes = [shape(step(scheduler)[0].rows[0]) for _ in range(3)]
    assert shapes == [("a", 0, 6, 0), ("a", 6, 6, 1), ("a", 12, 4, 4)]


@pytest.mark.parametrize("num_accepted", [1, 2, 4])
def test_the_next_window_starts_at_the_last_accepted_token(num_accepted: int) -> None:
    scheduler = make_scheduler()
    add(scheduler, make_state("a", 10))
    step(scheduler, num_accepted)
    plan, _ = step(scheduler, num_accepted)
    assert [shape(row) for row in plan.rows] == [("a", 9 + num_accepted, 4, 4)]


def test_a_window_is_no_longer_than_the_output_still_wanted() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_state("a", 10, block_length=16, max_tokens=3))
    plan, outputs = step(scheduler, 2)
    assert plan.rows[0].num_sampled == 3
    assert outputs[0].finish_reason is None
    plan, outputs = step(scheduler)
    assert plan.rows[0].num_sampled == 1
    assert outputs[0].finish_reason == "length"


def test_blocks_cover_the_tokens_of_a_row_and_no_block_has_two_owners() -> None:
    scheduler = make_scheduler()
    add(scheduler, *(make_state(name, length) for name, length in zip("abcd", (1, 4, 5, 11), strict=True)))
    for num_accepted in (1, 3, 2, 4):
        plan, _ = step(scheduler, num_accepted)
        assert all(len(row.block_ids) * BLOCK_SIZE >= row.end_position for row in plan.rows)
        held = [block_id for row in plan.rows for block_id in row.block_ids]
        assert len(held) == len(set(held))


def test_the_budget_holds_and_every_running_request_gets_a_token_in_every_step() -> None:
    draw = random.Random(3)
    scheduler = make_scheduler(num_seqs=6, budget=11)
    for index in range(40):
        add(scheduler, make_state(str(index), draw.randrange(1, 30), max_tokens=draw.randrange(1, 12)))
    while scheduler.has_work():
        num_running = scheduler.num_running
        plan, _ = step(scheduler, draw.randrange(1, 5))
        assert 0 < plan.num_tokens <= 11
        assert len(plan.rows) >= num_running
        assert all(row.num_tokens > 0 for row in plan.rows)


def test_windows_share_the_budget_equally() -> None:
    scheduler = make_scheduler(num_seqs=4, budget=20)
    add(scheduler, *(make_state(name, 1, block_length=16) for name in "abcd"))
    while scheduler.num_waiting:
        step(scheduler)
    plan, _ = step(scheduler)
    assert [row.num_sampled for row in plan.rows] == [5, 5, 5, 5]


def test_windows_leave_half_of_the_step_to_a_prompt() -> None:
    scheduler = make_scheduler(num_seqs=4, budget=32)
    add(scheduler, make_state("a", 1, block_length=32))
    step(scheduler)
    assert step(scheduler)[0].num_tokens == 32
    add(scheduler, make_state("b", 60))
    plan, _ = step(scheduler)
    assert [(row.request_id, row.num_tokens) for row in plan.rows] == [("a", 16), ("b", 16)]


@pytest.mark.parametrize(("num_requests", "window"), [(1, 8), (16, 1)])
def test_requests_that_come_at_once_leave_each_other_room(num_requests: int, window: int) -> None:
    """Each used to get the window of one alone behind its prompt."""
    times = StepTimes({1: 0.010, 16: 0.010, 64: 0.640}, max_tokens=64)
    pool = BlockPool(100, BLOCK_SIZE, prefix_caching=False)
    scheduler = Scheduler(pool, max_num_seqs=16, max_batched_tokens=64, draft_lengths=DraftLengths(times, 8))
    add(scheduler, *(make_state(str(index), 2, block_length=8) for index in range(num_requests)))
    plan, _ = step(scheduler)
    assert [row.num_sampled for row in plan.rows] == [window] * num_requests


def test_requests_start_in_the_order_they_came_even_where_a_later_one_would_fit() -> None:
    scheduler = make_scheduler(num_blocks=6)
    add(scheduler, make_state("first", 13), make_state("large", 12), make_state("small", 1))
    plan, _ = step(scheduler)
    assert ids(plan.rows) == ["first"]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)


def test_without_room_for_its_next_token_the_oldest_preempts_the_youngest() -> None:
    scheduler = make_scheduler(num_blocks=3)
    add(scheduler, *(make_state(name, 4, block_length=1) for name in "abc"))
    assert ids(step(scheduler)[0].rows) == ["a", "b", "c"]
    plan, _ = step(scheduler)
    assert ids(plan.rows) == ["a"]  # a took the block of c, then b had none but its own to give
    assert scheduler.num_waiting == 2
    while scheduler.has_work() and ids(plan.rows) != ["b"]:
        scheduler.abort("a")
        plan, _ = step(scheduler)
    assert [(a.request.request_id, a.token_ids) for a in plan.admissions] == [("b", (100, 101, 102, 103, WORD))]


def test_a_draft_alone_never_preempts() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, make_state("a", 5), make_state("b", 5))
    step(scheduler)
    plan, _ = step(scheduler)
    assert [shape(row) for row in plan.rows] == [("a", 5, 3, 3), ("b", 5, 3, 3)]  # up to the end of their blocks


def test_a_preempted_request_keeps_its_place_before_those_who_came_later() -> None:
    scheduler = make_scheduler(num_blocks=3, num_seqs=3)
    add(scheduler, *(make_state(name, 4, block_length=1, max_tokens=3) for name in "abcd"))
    ended: list[str] = []
    while scheduler.has_work():
        _, outputs = step(scheduler)
        ended += [output.request_id for output in outputs if output.finish_reason]
    assert ended == ["a", "b", "c", "d"]


def test_abort_of_a_waiting_request_is_reported_once() -> None:
    scheduler = make_scheduler(num_seqs=1)
    add(scheduler, make_state("a", 4), make_state("b", 4))
    step(scheduler)
    scheduler.abort("b")
    scheduler.abort("b")
    _, outputs = step(scheduler)
    assert [(output.request_id, output.finish_reason) for output in outputs] == [("b", "abort"), ("a", None)]
    assert [output.request_id for output in step(scheduler)[1]] == ["a"]


def test_abort_between_schedule_and_commit_drops_the_result_and_frees_the_blocks() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_state("a", 4), make_state("b", 4))
    plan = scheduler.schedule()
    scheduler.abort("a")
    outputs = scheduler.commit(plan, accept(plan))
    assert [(output.request_id, output.token_ids, output.finish_reason) for output in outputs] == [
        ("a", (), "abort"),
        ("b", (WORD,), None),
    ]
    scheduler.abort("b")
    assert scheduler.block_pool.num_free == scheduler.block_pool.num_blocks


def test_a_freed_slot_is_given_to_the_next_request() -> None:
    scheduler = make_scheduler(num_seqs=1)
    add(scheduler, make_state("a", 4), make_state("b", 4))
    first, _ = step(scheduler)
    scheduler.abort("a")
    second, _ = step(scheduler)
    assert [a.slot for a in first.admissions] == [a.slot for a in second.admissions] == [0]
    assert ids(second.rows) == ["b"]


def commit_one(state: RequestState, accepted_ids: tuple[int, ...], *, with_logprobs: bool = False) -> RequestOutput:
    scheduler = make_scheduler()
    add(scheduler, state)
    plan = scheduler.schedule()
    logprobs = tuple(TokenLogprobs(-float(i), (), ()) for i in range(len(accepted_ids))) if with_logprobs else None
    output = scheduler.commit(plan, StepResult((row_result(accepted_ids, logprobs),)))[0]
    scheduler.check()
    return output


def test_output_ends_at_a_stop_token_in_the_middle_of_the_accepted_ones() -> None:
    output = commit_one(make_state("a", 6), (WORD, STOP, WORD, WORD), with_logprobs=True)
    assert output.token_ids == (WORD, STOP)
    assert (output.finish_reason, output.stop_token_id) == ("stop", STOP)
    assert output.logprobs is not None
    assert len(output.logprobs) == output.stats.num_output_tokens == 2


def test_output_ends_at_its_length_and_a_stop_token_there_counts_as_stop() -> None:
    by_length = commit_one(make_state("a", 6, max_tokens=2), (WORD, WORD))
    assert (by_length.token_ids, by_length.finish_reason, by_length.stop_token_id) == ((WORD, WORD), "length", None)
    by_stop = commit_one(make_state("a", 6, max_tokens=2), (WORD, STOP))
    assert (by_stop.finish_reason, by_stop.stop_token_id) == ("stop", STOP)


def test_equal_prompts_share_their_full_blocks_but_compute_at_least_one_token() -> None:
    scheduler = make_scheduler(caching=True)
    add(scheduler, make_state("a", 12))
    first, _ = step(scheduler)
    add(scheduler, make_state("b", 12))
    second, _ = step(scheduler)
    row = second.rows[1]
    assert shape(row) == ("b", 8, 4 + 3, 4)
    assert row.block_ids[:2] == first.rows[0].block_ids[:2]
    assert row.block_ids[2] != first.rows[0].block_ids[2]


def test_a_request_preempted_with_its_blocks_still_cached_is_not_computed_again() -> None:
    scheduler = make_scheduler(num_blocks=7, caching=True)
    add(scheduler, make_state("a", 3, block_length=1), make_state("b", 11, block_length=1))
    step(scheduler)
    while scheduler.num_running == 2:
        step(scheduler)
    scheduler.abort("a")
    plan, _ = step(scheduler)
    admission, row = plan.admissions[0], plan.rows[0]
    assert admission.request.request_id == "b"
    assert len(admission.token_ids) - row.first_position <= BLOCK_SIZE


@pytest.mark.parametrize(
    ("wants_draft", "predicted_ids", "draft_ids"),
    [
        (True, (WORD, 6, 7, 8), (6, 7, 8)),
        (True, (WORD, 6, STOP, 8), (6,)),  # what follows an end would never be said
        (False, (WORD, 6, 7, 8), ()),
    ],
)
def test_unaccepted_predictions_are_reported_to_who_asks(
    wants_draft: bool, predicted_ids: tuple[int, ...], draft_ids: tuple[int, ...]
) -> None:
    scheduler = make_scheduler()
    add(scheduler, make_state("a", 6, wants_draft=wants_draft))
    result = RowResult(predicted_ids=predicted_ids, num_accepted=1)
    output = scheduler.commit(scheduler.schedule(), StepResult((result,)))[0]
    assert (output.token_ids, output.draft_ids) == ((WORD,), draft_ids)


def test_an_output_that_ended_has_no_draft() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_state("a", 6, wants_draft=True))
    result = RowResult(predicted_ids=(STOP, 6, 7, 8), num_accepted=1)
    output = scheduler.commit(scheduler.schedule(), StepResult((result,)))[0]
    assert (output.finish_reason, output.draft_ids) == ("stop", ())


def test_a_draft_never_takes_the_place_of_a_request() -> None:
    """The oldest row's draft used to take the last free blocks, which kept out or preempted younger requests."""
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, make_state("a", 5, block_length=16), make_state("b", 5, block_length=16))
    for _ in range(3):
        plan, outputs = step(scheduler)
        assert ids(plan.rows) == ["a", "b"]
        assert all(output.stats.num_preemptions == 0 for output in outputs)


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    scheduler = make_scheduler(num_seqs=8, budget=1000, caching=True)
    add(scheduler, *(make_state(str(i), 102, block_length=1) for i in range(8)))
    plan, _ = step(scheduler)
    assert [row.num_tokens for row in plan.rows] == [102] + [2] * 7
    assert {row.block_ids[:25] for row in plan.rows} == {plan.rows[0].block_ids[:25]}
    assert len({row.block_ids[25] for row in plan.rows}) == 8


def test_a_prompt_shares_what_a_running_request_computes_in_the_same_step() -> None:
    scheduler = make_scheduler(budget=24, caching=True)
    add(scheduler, make_state("a", 40, block_length=1))
    step(scheduler)
    add(scheduler, make_state("b", 41, block_length=1))
    plan, _ = step(scheduler)
    assert [shape(row) for row in plan.rows] == [("a", 24, 16, 1), ("b", 40, 1, 1)]


def test_shared_blocks_stay_when_the_request_that_fills_them_is_aborted_meanwhile() -> None:
    scheduler = make_scheduler(budget=100, caching=True)
    add(scheduler, *(make_state(name, 18, block_length=1) for name in ("a", "b")))
    plan = scheduler.schedule()
    scheduler.abort("a")
    scheduler.commit(plan, accept(plan))
    scheduler.check()
    add(scheduler, make_state("c", 18, block_length=1))
    assert [shape(row) for row in step(scheduler)[0].rows] == [("b", 18, 1, 1), ("c", 16, 2, 1)]


def test_nothing_is_shared_beyond_the_tokens_that_a_step_computes() -> None:
    scheduler = make_scheduler(budget=30, caching=True)
    add(scheduler, make_state("a", 22, block_length=1), make_state("b", 22, block_length=1))
    other = make_state("c", 22, block_length=1)
    other.request = msgspec.structs.replace(other.request, cache_salt="private")
    add(scheduler, other)
    assert [shape(row) for row in step(scheduler)[0].rows] == [("a", 0, 22, 1), ("b", 20, 2, 1), ("c", 0, 6, 0)]


def linear_times(seconds_per_token: float) -> StepTimes:
    return StepTimes({1: seconds_per_token, 64: 64 * seconds_per_token}, max_tokens=64)


def test_a_prompt_holds_running_streams_up_no_longer_than_the_setting_says() -> None:
    scheduler = make_scheduler(step_times=linear_times(0.001), prefill_step_seconds=0.02)
    add(scheduler, make_state("stream", 2, block_length=1))
    step(scheduler)
    add(scheduler, make_state("long", 60, block_length=1))
    plans = [step(scheduler)[0] for _ in range(4)]
    assert [[row.num_tokens for row in plan.rows] for plan in plans] == [[1, 19], [1, 19], [1, 19], [1, 3]]


def test_a_prompt_alone_gets_the_whole_budget() -> None:
    scheduler = make_scheduler(step_times=linear_times(0.001), prefill_step_seconds=0.02)
    add(scheduler, make_state("a", 60, block_length=1), make_state("b", 60, block_length=1))
    assert [row.num_tokens for row in step(scheduler)[0].rows] == [60, 4]


@pytest.mark.parametrize(("seconds_per_token", "expected"), [(0.5, 4), (0.01, 4)])
def test_a_prompt_advances_by_a_block_however_slow_the_machine(seconds_per_token: float, expected: int) -> None:
    scheduler = make_scheduler(step_times=linear_times(seconds_per_token), prefill_step_seconds=0.02)
    add(scheduler, make_state("stream", 2, block_length=1))
    step(scheduler)
    add(scheduler, make_state("long", 60, block_length=1))
    assert [row.num_tokens for row in step(scheduler)[0].rows] == [1, expected]


def test_a_prompt_takes_as_long_as_the_step_would_without_it() -> None:
    """A step of 0.3 s whatever its size: a limit of 0.02 s must not make the prompt 60 steps long."""
    times = StepTimes({1: 0.3, 64: 0.31}, max_tokens=64)
    scheduler = make_scheduler(step_times=times, prefill_step_seconds=0.02)
    add(scheduler, make_state("stream", 2, block_length=1))
    step(scheduler)
    add(scheduler, make_state("long", 60, block_length=1))
    assert [row.num_tokens for row in step(scheduler)[0].rows] == [1, 60]


def test_the_largest_step_within_a_time_takes_no_longer() -> None:
    times = StepTimes({1: 0.010, 16: 0.020, 64: 0.100}, max_tokens=64)
    for seconds in (0.005, 0.0101, 0.02, 0.05, 0.099, 5.0):
        count = times.num_tokens_within(seconds)
        assert count == 0 or times.seconds(count) <= seconds
        assert count == 64 or times.seconds(count + 1) > seconds


def test_requests_that_wait_for_too_long_end_with_an_error_and_leave_the_others() -> None:
    now = [0.0]
    scheduler = Scheduler(
        BlockPool(100, 4), max_num_seqs=1, max_batched_tokens=64, queue_timeout=10.0, clock=lambda: now[0]
    )
    for index in range(3):
        now[0] = 4.0 * index
        scheduler.add(make_state(str(index), 3))
        if index == 0:
            scheduler.schedule()
    now[0] = 14.5
    scheduler.expire()
    outputs = scheduler.commit(StepPlan(rows=()), StepResult(rows=()))
    assert [(output.request_id, output.error_code) for output in outputs] == [("1", "queue_timeout")]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    scheduler.check()
