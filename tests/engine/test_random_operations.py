"""Add, abort and step in whatever order: right answers, sound books, nothing lost, nobody starved."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_core.engine.plan import StepPlan
from cllm_core.request import SamplingParams
from tests.engine.factories import Reader, Setup, make_request, make_scripted_engine
from tests.engine.scripted import CORRUPTED, EOS, FIRST_WORD, VOCAB_SIZE, scripted_ar

BLOCK_SIZE = 4
STEMS = (tuple(range(2, 15)), tuple(range(2, 10)), ())  # shared beginnings, one a part of another


@dataclass(frozen=True, slots=True)
class Add:
    prompt_ids: tuple[int, ...]
    num_new: int
    block_length: int | None
    use_prediction: bool
    salt: str


@dataclass(frozen=True, slots=True)
class Abort:
    index: int  # of the request, in the order of adding


@dataclass(frozen=True, slots=True)
class Step:
    count: int


Operation = Add | Abort | Step

words = st.integers(FIRST_WORD, VOCAB_SIZE - 1)


def operations_with(block_lengths: Sequence[int | None]) -> st.SearchStrategy[list[Operation]]:
    adds = st.builds(
        Add,
        prompt_ids=st.builds(
            lambda stem, rest: (*stem, *rest), st.sampled_from(STEMS), st.lists(words, min_size=1, max_size=9)
        ),
        num_new=st.integers(1, 24),
        block_length=st.sampled_from(block_lengths),
        use_prediction=st.booleans(),
        salt=st.sampled_from(["", "", "other"]),
    )
    return st.lists(
        st.one_of(adds, adds, st.builds(Abort, st.integers(0, 12)), st.builds(Step, st.integers(1, 6))),
        min_size=1,
        max_size=30,
    )


# AR alone is what steps can be launched ahead of.
operations = st.one_of(operations_with([None, 1, 2, 5, 16, 32]), operations_with([1]))
setups = st.builds(
    lambda num_blocks, num_seqs, extra, caching, ahead: Setup(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_seqs,
        max_batched_tokens=num_seqs + extra,
        prefix_caching=caching,
        runs_ahead=ahead,
    ),
    num_blocks=st.integers(12, 40),  # the longest text, 13 + 9 + 24 tokens, needs 12
    num_seqs=st.integers(1, 6),
    extra=st.integers(0, 40),
    caching=st.booleans(),
    ahead=st.booleans(),
)


def apply(operations: Sequence[Operation], reader: Reader) -> dict[str, Add]:
    added: dict[str, Add] = {}
    for operation in operations:
        match operation:
            case Add():
                request_id = str(len(added))
                added[request_id] = operation
                params = SamplingParams(
                    temperature=0, max_tokens=operation.num_new, block_length=operation.block_length
                )
                hint = scripted_ar(operation.prompt_ids, 12) if operation.use_prediction else ()
                reader.add(
                    make_request(
                        request_id, operation.prompt_ids, params, prediction_ids=hint, cache_salt=operation.salt
                    )
                )
            case Abort():
                reader.engine.abort(str(operation.index))
                reader.engine.check()
            case Step():
                for _ in range(operation.count):
                    reader.step()
    return added


@settings(max_examples=250, deadline=None)
@given(setup=setups, operations=operations)
def test_every_request_ends_once_with_its_ar_text(setup: Setup, operations: list[Operation]) -> None:
    reader = Reader(make_scripted_engine(setup))
    added = apply(operations, reader)
    answers = reader.drain()  # bounded, leak-free, one end each
    for request_id, add in added.items():
        answer, text = answers[request_id], scripted_ar(add.prompt_ids, add.num_new)
        if answer.finish_reason == "abort":
            assert answer.token_ids == text[: len(answer.token_ids)]
        else:
            assert answer.token_ids == text
            assert answer.finish_reason == ("stop" if text[-1] == EOS else "length")
        assert answer.stats.num_output_tokens == len(answer.token_ids)
        assert answer.stats.num_forward_passes <= len(answer.token_ids)


@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(st.lists(words, min_size=1, max_size=20), min_size=2, max_size=8), extra=st.integers(0, 20))
def test_the_oldest_request_advances_in_every_step(prompts: list[list[int]], extra: int) -> None:
    setup = Setup(num_blocks=12, block_size=BLOCK_SIZE, max_num_seqs=4, max_batched_tokens=4 + extra)
    reader = Reader(make_scripted_engine(setup))
    plans: list[StepPlan] = []
    reader.engine.observer = lambda plan, result: plans.append(plan)
    for index, prompt in enumerate(prompts):
        reader.add(make_request(str(index), prompt, SamplingParams(temperature=0, max_tokens=20)))
    while reader.engine.has_work():
        oldest = next(request_id for request_id, answer in reader.answers.items() if not answer.finish_reason)
        reader.step()
        assert plans[-1].rows[0].request_id == oldest
        assert plans[-1].rows[0].num_tokens >= 1


@pytest.mark.parametrize("block_length", [2, 5, 16, 32])
def test_scripted_text_is_drafted_well(block_length: int) -> None:
    """Guards the other tests: they mean little unless drafts are accepted, rejected and cut."""
    reader = Reader(make_scripted_engine(Setup(block_length=block_length, max_batched_tokens=512)))
    for index in range(12):
        prompt = [FIRST_WORD + (index * 7 + step * step) % 60 for step in range(9)]
        reader.add(make_request(str(index), prompt, SamplingParams(temperature=0, max_tokens=80)))
    answers = reader.drain().values()
    num_tokens, num_passes = (
        sum(len(answer.token_ids) for answer in answers),
        sum(answer.stats.num_forward_passes for answer in answers),
    )
    assert min(1.5, block_length) < num_tokens / num_passes < block_length
    assert all(CORRUPTED not in answer.token_ids for answer in answers)
