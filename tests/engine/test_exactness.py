"""In fp32, Jacobi output equals what the model says token by token, whatever the schedule."""

import random
from functools import cache

import pytest

from cllm_core.request import NewRequest, SamplingParams
from tests.architectures import Architecture
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE
from tests.engine.factories import Reader, Setup, decode, greedy_ar, make_engine, make_request, plain_model

NUM_NEW = 24
BLOCK_LENGTHS = (1, 2, 5, 16, 32)
SMALL_POOL, ROOMY_POOL = 22, 200  # blocks of 4 tokens; the longest text needs 18

Prompt = tuple[int, ...]


@cache
def prompts() -> list[Prompt]:
    """Lengths around block and window borders; some share a beginning."""
    draw = random.Random(0)
    stem = tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(17))
    fresh = [tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(length)) for length in (1, 3, 4, 21, 45)]
    return [*fresh, stem, (*stem, 7), (*stem[:9], 5, 6)]


@cache
def expected(architecture: Architecture) -> list[list[int]]:
    return [greedy_ar(plain_model(architecture), prompt, NUM_NEW) for prompt in prompts()]


def edited(text: list[int], at: int) -> list[int]:
    """A prediction that is right up to a token, so that windows of all lengths are accepted in part."""
    return [*text[:at], (text[at] + 1) % VOCAB_SIZE, *text[at + 1 :]]


def requests(architecture: Architecture, *, block_length: int | None = None) -> list[NewRequest]:
    """All but one with a partly right prediction: a random model's text offers nothing else to accept."""
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, block_length=block_length)
    return [
        make_request(str(index), prompt, params, prediction_ids=edited(text, at=3 * index - 1) if index else ())
        for index, (prompt, text) in enumerate(zip(prompts(), expected(architecture), strict=True))
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
@pytest.mark.parametrize("num_blocks", [SMALL_POOL, ROOMY_POOL])
def test_jacobi_output_equals_transformers_greedy_generate(
    architecture: Architecture, block_length: int, num_blocks: int
) -> None:
    prefix_caching = block_length % 2 == 0
    budget = 13 if num_blocks == SMALL_POOL else 64
    setup = Setup(
        block_length=block_length,
        num_blocks=num_blocks,
        max_batched_tokens=budget,
        prefix_caching=prefix_caching,
    )
    answers = decode(make_engine(architecture, setup), requests(architecture)).values()
    assert [answer.token_ids for answer in answers] == expected(architecture)
    assert (sum(answer.stats.num_preemptions for answer in answers) > 0) == (num_blocks == SMALL_POOL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_mixed_requests_that_arrive_at_random_get_their_greedy_output(
    architecture: Architecture, prefix_caching: bool
) -> None:
    draw = random.Random(int(prefix_caching))
    setup = Setup(num_blocks=60, max_batched_tokens=19, max_num_seqs=5, prefix_caching=prefix_caching)
    reader = Reader(make_engine(architecture, setup))
    for request in requests(architecture):
        params = SamplingParams(temperature=0, max_tokens=NUM_NEW, block_length=draw.choice(BLOCK_LENGTHS))
        reader.add(make_request(request.request_id, request.prompt_ids, params, prediction_ids=request.prediction_ids))
        for _ in range(draw.randrange(4)):
            reader.step()
    assert [answer.token_ids for answer in reader.drain().values()] == expected(architecture)


@pytest.mark.parametrize("budget", [8, 9, 23])
def test_odd_prompt_chunks_change_nothing(budget: int) -> None:
    answers = decode(make_engine("mistral", Setup(max_batched_tokens=budget)), requests("mistral"))
    assert [answer.token_ids for answer in answers.values()] == expected("mistral")


def test_ar_takes_one_pass_per_token_and_partly_right_drafts_take_fewer() -> None:
    ar = decode(make_engine("llama", Setup(block_length=1)), requests("llama")).values()
    jacobi = decode(make_engine("llama", Setup(block_length=16, max_batched_tokens=512)), requests("llama")).values()
    assert all(answer.stats.num_forward_passes == len(answer.token_ids) for answer in ar)
    assert list(jacobi)[-1].stats.tokens_per_forward > 4  # its prediction is right for 20 of 24 tokens
