"""Steps launched before the one before them is read bring every request what it gets from steps one at a time."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from cllm_core.engine.draft_length import EXPLORE_EVERY
from cllm_core.engine.engine import Engine
from cllm_core.engine.plan import StepPlan, StepResult
from cllm_core.engine.runner import LaunchedStep, ModelRunner
from cllm_core.engine.step_times import StepTimes
from cllm_core.request import NewRequest, SamplingParams
from cllm_core.text.grammar import regex_grammar
from tests.engine.factories import (
    Answer,
    Launches,
    Reader,
    Setup,
    decode,
    decode_one,
    make_engine,
    make_request,
    make_scripted_engine,
)
from tests.engine.scripted import EOS, scripted_ar
from tests.engine.test_static_steps import make_static_engine

SETUP = Setup(block_length=1, runs_ahead=True)
STEM = tuple(range(2, 15))
NUM_NEW = 40


def greedy(**params: object) -> SamplingParams:
    return SamplingParams(temperature=0, **{"max_tokens": NUM_NEW, **params})  # type: ignore[arg-type]


def ending_prompts(count: int) -> list[tuple[int, ...]]:
    """Prompts whose scripted texts end by themselves, each after another number of tokens."""
    by_length: dict[int, tuple[int, ...]] = {}
    for number in range(3000):
        prompt = (*STEM, 2 + number % 60, 2 + number // 60)
        text = scripted_ar(prompt, NUM_NEW)
        if text[-1] == EOS and len(text) > 2:
            by_length.setdefault(len(text), prompt)
    assert len(by_length) >= count
    return list(by_length.values())[:count]


def mixed_requests() -> list[NewRequest]:
    """Greedy and sampled, ended by the model, by a stop token and by a limit, with probabilities and without."""
    kinds = [
        greedy(),
        greedy(logprobs=2),
        greedy(max_tokens=9),
        greedy(stop_token_ids=(5, 9), min_tokens=4),
        SamplingParams(seed=3, max_tokens=NUM_NEW),
        SamplingParams(seed=4, temperature=0.8, top_p=0.9, logprobs=1, max_tokens=NUM_NEW),
        SamplingParams(seed=5, top_k=8, logit_bias={7: 3.0}, max_tokens=NUM_NEW),
        greedy(prompt_logprobs=1),
        greedy(max_tokens=1),
        greedy(max_tokens=0),
    ]
    prompts = ending_prompts(2 * len(kinds))
    return [make_request(str(index), prompt, kinds[index % len(kinds)]) for index, prompt in enumerate(prompts)]


def outcome(answers: dict[str, Answer]) -> dict[str, tuple[object, ...]]:
    """All that a request is told but how it was scheduled."""
    return {
        name: (answer.token_ids, answer.logprobs, answer.finish_reason, answer.stop_token_id)
        for name, answer in answers.items()
    }


def arrive(engine: Engine, requests: Sequence[NewRequest], *, seed: int) -> dict[str, Answer]:
    """Some at once, the others at random while those are decoded."""
    draw, reader = random.Random(seed), Reader(engine)
    for request in requests:
        reader.add(request)
        for _ in range(draw.choice([0, 0, 0, 1, 5])):
            reader.step()
    return reader.drain()


@pytest.mark.parametrize("num_blocks", [17, 200])  # 17 force preemption: the longest text needs 14 blocks
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_those_of_steps_one_at_a_time(num_blocks: int, prefix_caching: bool, seed: int) -> None:
    setup = replace(SETUP, num_blocks=num_blocks, prefix_caching=prefix_caching)
    ahead, one_at_a_time = make_scripted_engine(setup), make_scripted_engine(replace(setup, runs_ahead=False))
    launches = Launches(ahead)
    answers = arrive(ahead, mixed_requests(), seed=seed)
    assert outcome(answers) == outcome(arrive(one_at_a_time, mixed_requests(), seed=seed))
    assert launches.num_ahead > (10 if num_blocks == 17 else len(launches.steps) // 2)
    assert (sum(answer.stats.num_preemptions for answer in answers.values()) > 0) == (num_blocks == 17)


@pytest.mark.parametrize("make", [make_engine, make_static_engine])
def test_a_model_of_layers_gives_the_same_outputs(make: Callable[..., Engine]) -> None:
    kinds = [
        SamplingParams(seed=1, max_tokens=12, logprobs=1),
        greedy(max_tokens=20),
        SamplingParams(seed=2, top_p=0.7),
    ]
    requests = [make_request(str(index), range(5, 9 + index), params) for index, params in enumerate(kinds)]
    requests[2] = make_request("2", range(30, 33), SamplingParams(seed=2, top_p=0.7, max_tokens=30))
    setup = Setup(block_length=1, num_blocks=60, runs_ahead=True)
    engine = make("qwen3", setup)
    launches = Launches(engine)
    assert outcome(decode(engine, requests)) == outcome(
        decode(make("qwen3", replace(setup, runs_ahead=False)), requests)
    )
    assert launches.num_ahead > 15


def test_all_steps_but_the_first_are_launched_ahead_and_one_in_vain() -> None:
    engine = make_scripted_engine(SETUP)
    launches = Launches(engine)
    [prompt] = ending_prompts(1)
    answer = decode_one(engine, make_request("a", prompt, greedy()))
    assert answer.token_ids[-1] == EOS
    # The prompt's step is not of one token, and the one behind it is the first that another can follow.
    assert (len(launches.steps), launches.num_ahead) == (len(answer.token_ids) + 1, len(answer.token_ids) - 1)


def test_a_limit_is_known_in_advance() -> None:
    engine = make_scripted_engine(SETUP)
    launches = Launches(engine)
    decode_one(engine, make_request("a", STEM, greedy(max_tokens=10, ignore_eos=True)))
    assert (len(launches.steps), launches.num_ahead) == (10, 8)


def test_a_step_in_flight_is_work_until_it_is_read() -> None:
    reader = Reader(make_scripted_engine(SETUP))
    reader.add(make_request("a", ending_prompts(1)[0], greedy()))
    while not reader.answers["a"].finish_reason:
        reader.step()
    assert reader.engine.has_work()
    assert reader.step() == []
    assert not reader.engine.has_work()
    reader.add(make_request("b", STEM, greedy()))
    assert reader.drain()["b"].token_ids == scripted_ar(STEM, NUM_NEW)


@pytest.mark.parametrize("num_steps", range(3, 8))
def test_an_abort_drops_what_is_in_flight_and_its_id_may_be_used_at_once(num_steps: int) -> None:
    reader = Reader(make_scripted_engine(replace(SETUP, num_blocks=24)))
    reader.add(make_request("a", STEM, greedy(ignore_eos=True)))
    reader.add(make_request("b", STEM[:7], greedy(ignore_eos=True)))
    for _ in range(num_steps):
        reader.step()
    reader.engine.abort("a")
    reader.engine.check()
    num_told = len(reader.answers["a"].token_ids)
    reader.engine.add_request(make_request("a", STEM[3:], greedy()))
    first, *_ = reader.step()
    assert (first.request_id, first.finish_reason, num_told) == ("a", "abort", num_steps)
    reader.answers["a"] = Answer()
    answers = reader.drain()
    assert answers["a"].token_ids == scripted_ar(STEM[3:], NUM_NEW)
    assert len(answers["b"].token_ids) == NUM_NEW


def test_aborting_all_ends_all_in_one_step() -> None:
    reader = Reader(make_scripted_engine(SETUP))
    for name in "ab":
        reader.add(make_request(name, STEM, greedy(ignore_eos=True)))
    for _ in range(4):
        reader.step()
    for name in "ab":
        reader.engine.abort(name)
    assert [output.finish_reason for output in reader.step()] == ["abort", "abort"]
    assert not reader.engine.has_work()


def test_prefixes_left_by_requests_that_ended_in_flight_are_sound() -> None:
    """A stale or foreign slot changes what the scripted model says."""
    engine = make_scripted_engine(replace(SETUP, num_blocks=60))
    prompts = ending_prompts(12)
    first = decode(engine, [make_request(str(index), prompt, greedy()) for index, prompt in enumerate(prompts)])
    longer = [(*prompt, *answer.token_ids) for prompt, answer in zip(prompts, first.values(), strict=True)]
    again = decode(engine, [make_request(str(index), prompt, greedy()) for index, prompt in enumerate(longer)])
    assert [answer.token_ids for answer in again.values()] == [scripted_ar(prompt, NUM_NEW) for prompt in longer]
    assert sum(answer.stats.num_cached_tokens for answer in again.values()) > 100


def test_a_request_that_arrives_is_read_in_the_step_behind_the_one_in_flight() -> None:
    reader = Reader(make_scripted_engine(SETUP))
    launches = Launches(reader.engine)
    reader.add(make_request("a", STEM, greedy(ignore_eos=True)))
    for _ in range(5):
        reader.step()
    reader.add(make_request("b", range(30, 35), greedy()))
    assert [output.request_id for output in reader.step()] == ["a"]
    assert [output.request_id for output in reader.step()] == ["a", "b"]
    assert [len(step.rows) for step in launches.steps[-3:]] == [1, 1, 2]


def test_an_observer_sees_no_row_of_a_request_that_has_ended() -> None:
    engine = make_scripted_engine(SETUP)
    seen: dict[str, list[int]] = {str(index): [] for index in range(8)}

    def observe(plan: StepPlan, result: StepResult) -> None:
        for row, found in zip(plan.rows, result.rows, strict=True):
            seen[row.request_id] += found.accepted_ids

    engine.observer = observe
    answers = decode(engine, [make_request(str(i), prompt, greedy()) for i, prompt in enumerate(ending_prompts(8))])
    assert seen == {name: answer.token_ids for name, answer in answers.items()}


@pytest.mark.parametrize(
    "params",
    [
        greedy(block_length=4),
        greedy(frequency_penalty=0.5),
        greedy(presence_penalty=0.5),
        SamplingParams(seed=1, repetition_penalty=1.2, max_tokens=NUM_NEW),
        greedy(max_tokens=2),
    ],
)
def test_nothing_is_launched_ahead_beside_a_request_whose_next_token_takes_the_text(params: SamplingParams) -> None:
    engine = make_scripted_engine(SETUP)
    launches = Launches(engine)
    reader = Reader(engine)
    for name, one in (("a", params), ("b", greedy(ignore_eos=True, max_tokens=NUM_NEW + 10))):
        reader.add(make_request(name, STEM, one))
    while not reader.answers["a"].finish_reason:
        reader.step()
    assert launches.num_ahead == 0
    reader.drain()
    assert launches.num_ahead > 0


def test_nothing_is_launched_ahead_beside_a_grammar() -> None:
    engine = make_engine("llama", SETUP)
    launches = Launches(engine)
    params = greedy(grammar=regex_grammar("[a-f]{20,30}"))
    decode(engine, [make_request("a", STEM, params), make_request("b", STEM, greedy(max_tokens=5))])
    assert launches.num_ahead == 0


def test_a_prompt_that_is_read_token_by_token_is_not_launched_ahead() -> None:
    engine = make_scripted_engine(replace(SETUP, max_num_seqs=1, max_batched_tokens=1))
    launches = Launches(engine)
    answer = decode_one(engine, make_request("a", STEM, greedy(max_tokens=5, ignore_eos=True)))
    assert answer.token_ids == scripted_ar(STEM, 5)
    assert (len(launches.steps), launches.num_ahead) == (len(STEM) + 4, 4)


def test_nothing_is_launched_ahead_while_a_request_may_be_admitted() -> None:
    """Three texts of up to 13 blocks in a pool for two: the third waits for blocks though it could have a slot."""
    engine = make_scripted_engine(replace(SETUP, num_blocks=14, max_num_seqs=3))
    launches = Launches(engine)
    reader = Reader(engine)
    for index in range(3):
        reader.add(make_request(str(index), range(2 + index, 26 + index), greedy(ignore_eos=True, max_tokens=20)))
    while engine.stats().num_waiting or not launches.steps:
        reader.step()
        assert launches.num_ahead == 0
    reader.drain()
    assert launches.num_ahead > 0


def test_requests_that_wait_for_a_slot_do_not_hold_steps_up() -> None:
    engine = make_scripted_engine(replace(SETUP, max_num_seqs=2))
    launches = Launches(engine)
    prompts = ending_prompts(8)
    answers = decode(engine, [make_request(str(index), prompt, greedy()) for index, prompt in enumerate(prompts)])
    assert [answer.token_ids for answer in answers.values()] == [scripted_ar(prompt, NUM_NEW) for prompt in prompts]
    assert launches.num_ahead > len(launches.steps) // 2


class FixedTimes(StepTimes):
    """Step times that stay as they are; it notes what is observed."""

    def __init__(self, measured: dict[int, float]) -> None:
        super().__init__(measured, max_tokens=64)
        self.observed: list[int] = []

    def observe(self, num_tokens: int, seconds: float) -> None:
        self.observed.append(num_tokens)


def test_windows_that_the_policy_keeps_at_one_token_are_launched_ahead_but_for_the_same_turns_of_exploring() -> None:
    """Each token costs nearly what a step of one costs, so nothing else is drafted."""
    requests = [make_request(str(i), (*STEM, i + 2), greedy(max_tokens=300, ignore_eos=True)) for i in range(4)]
    turns = {}
    for runs_ahead in (True, False):
        # Blocks for all: nobody is preempted, a step earlier or later.
        setup = replace(SETUP, block_length=16, num_blocks=400, runs_ahead=runs_ahead)
        engine = make_scripted_engine(setup, FixedTimes({1: 1.2, 64: 64.2}))
        launches = Launches(engine)
        answers = decode(engine, requests)
        assert [answer.token_ids for answer in answers.values()] == [whole_text(request) for request in requests]
        turns[runs_ahead] = [any(row.num_sampled > 1 for row, _ in step.rows) for step in launches.steps]
        assert (launches.num_ahead > len(launches.steps) / 2) == runs_ahead
    assert turns[True] == turns[False]
    assert sum(turns[True]) > len(turns[True]) / EXPLORE_EVERY


def whole_text(request: NewRequest) -> list[int]:
    return decode_one(make_scripted_engine(), request).token_ids


def test_windows_that_the_policy_lengthens_are_not_launched_ahead() -> None:
    engine = make_scripted_engine(replace(SETUP, block_length=16), FixedTimes({1: 1.0, 64: 1.0}))
    launches = Launches(engine)
    decode_one(engine, make_request("a", STEM, greedy(ignore_eos=True)))
    assert launches.num_ahead == 0


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_times_are_learnt_of_every_step_whose_end_the_host_sees(runs_ahead: bool) -> None:
    lengths = FixedTimes({1: 1.0, 64: 64.0})
    engine = make_scripted_engine(replace(SETUP, runs_ahead=runs_ahead, max_batched_tokens=8), lengths)
    launches = Launches(engine)
    decode_one(engine, make_request("a", STEM, greedy(max_tokens=6, ignore_eos=True)))
    assert lengths.observed == [step.plan.num_tokens for step in launches.steps] == [8, 5, 1, 1, 1, 1, 1]


def test_no_time_is_learnt_of_steps_that_nobody_waits_for_nor_of_those_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device, reading prompts yields nothing to read: the host is done when they are launched."""
    monkeypatch.setattr(ModelRunner, "is_asynchronous", True)
    lengths = FixedTimes({1: 1.0, 64: 64.0})
    engine = make_scripted_engine(replace(SETUP, max_num_seqs=4, max_batched_tokens=4), lengths)
    decode_one(engine, make_request("a", STEM, greedy(max_tokens=6, ignore_eos=True)))  # in steps of 4, 4, 4, 1, 1 ...
    assert lengths.observed == [1] * 5


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_no_time_is_learnt_of_steps_that_record_their_shape(runs_ahead: bool) -> None:
    lengths = FixedTimes({1: 1.0, 64: 64.0})
    engine = make_scripted_engine(replace(SETUP, runs_ahead=runs_ahead), lengths)
    launch = engine.runner.launch
    num_launched = 0

    def recording_the_fourth(plan: StepPlan, *, behind: LaunchedStep | None = None) -> LaunchedStep:
        nonlocal num_launched
        num_launched += 1
        return replace(launch(plan, behind=behind), has_captured=num_launched == 4)

    engine.runner.launch = recording_the_fourth  # type: ignore[method-assign]
    decode_one(engine, make_request("a", STEM, greedy(max_tokens=8, ignore_eos=True)))
    # Recorded while the step before it is in flight, it makes that one's time wrong, too.
    assert len(lengths.observed) == num_launched - (2 if runs_ahead else 1)


def test_a_shape_is_recorded_in_the_step_that_meets_it_first() -> None:
    engine = make_static_engine("llama", Setup(block_length=1))
    launches = Launches(engine)
    decode_one(engine, make_request("a", STEM, greedy(max_tokens=6)))
    assert [step.has_captured for step in launches.steps] == [True, True, False, False, False, False]
