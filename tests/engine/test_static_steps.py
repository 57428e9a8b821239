"""An engine whose steps are padded to buckets and repeated gives the tokens of one whose steps run as they come."""

import pytest
from transformers import PreTrainedModel

from cllm_core.backends.cuda.static_steps import Buckets, Work
from cllm_core.backends.paged_model import PagedModel
from cllm_core.engine.engine import Engine
from cllm_core.request import NewRequest, SamplingParams
from tests.architectures import Architecture
from tests.backends.factories import graphed
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE
from tests.engine.factories import Setup, decode, engine_over, greedy_ar, make_request, paged_model, plain_model

PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 4, 21, 30)]
NUM_NEW = 12


def repeat_as_it_is(work: Work) -> Work:
    work()
    return work


def statically_paged(model: PreTrainedModel, setup: Setup) -> PagedModel:
    # Smaller than the largest steps, so that some fit no bucket.
    buckets = Buckets.of(max_rows=setup.max_num_seqs, max_tokens=setup.max_batched_tokens // 2)
    paged = graphed(model, repeat_as_it_is, buckets)
    paged.allocate_cache(num_blocks=setup.num_blocks, block_size=setup.block_size)
    paged.enable_graphs(max_model_len=setup.context)
    return paged


def make_static_engine(architecture: Architecture, setup: Setup) -> Engine:
    return engine_over(paged_model(architecture), setup, statically_paged)


@pytest.mark.parametrize(("architecture", "block_length"), [("llama", 1), *((name, 8) for name in ARCHITECTURES)])
def test_greedy_output_equals_transformers_generate(architecture: Architecture, block_length: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW)
    expected = [greedy_ar(plain_model(architecture), prompt, NUM_NEW) for prompt in PROMPTS]
    requests = [
        make_request(str(index), prompt, params, prediction_ids=[*text[:5], 5, *text[6:]])
        for index, (prompt, text) in enumerate(zip(PROMPTS, expected, strict=True))
    ]
    setup = Setup(block_length=block_length, num_blocks=40)
    answers = decode(make_static_engine(architecture, setup), requests)
    assert [answer.token_ids for answer in answers.values()] == expected


def sampling_requests() -> list[NewRequest]:
    """Of all kinds: the logits are read by everything that comes between them and a token."""
    kinds = [
        SamplingParams(temperature=0.9, seed=1, max_tokens=NUM_NEW, ignore_eos=True),
        SamplingParams(temperature=1.3, top_p=0.9, top_k=40, seed=2, max_tokens=NUM_NEW, ignore_eos=True),
        SamplingParams(temperature=0, frequency_penalty=0.7, max_tokens=NUM_NEW, logprobs=2, ignore_eos=True),
        SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=NUM_NEW, ignore_eos=True),
    ]
    return [make_request(str(index), PROMPTS[index], params) for index, params in enumerate(kinds)]


def test_sampled_tokens_and_their_probabilities_are_the_same() -> None:
    plain = decode(engine_over(paged_model("qwen3")), sampling_requests())
    static = decode(make_static_engine("qwen3", Setup()), sampling_requests())
    for name, answer in static.items():
        assert answer.token_ids == plain[name].token_ids
        assert len(answer.token_ids) == NUM_NEW
        assert max(answer.token_ids) < VOCAB_SIZE
    found, expected = ([one.logprob for one in answers["2"].logprobs] for answers in (static, plain))
    assert found == pytest.approx(expected, abs=1e-3)
