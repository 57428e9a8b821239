"""Sampling through the whole engine: a seed fixes the text, whatever the block length, the batch and the cache."""

import random
from functools import cache

import pytest
import torch
from msgspec.structs import replace

from cllm_core.engine.named_tokens import NamedTokens
from cllm_core.engine.sampling import sample
from cllm_core.engine.sampling_batch import RowSampling, SamplingBatch
from cllm_core.request import SamplingParams
from tests.checkpoints import VOCAB_SIZE
from tests.engine.factories import (
    Answer,
    Reader,
    Setup,
    decode,
    decode_one,
    make_engine,
    make_request,
    make_scripted_engine,
    plain_model,
)

NUM_NEW = 24
PROMPT = tuple(range(20, 33))

SAMPLING = {
    "plain": SamplingParams(temperature=1.0),
    "cool and cut": SamplingParams(temperature=0.7, top_p=0.8, top_k=20, min_p=0.01),
    "presence and frequency": SamplingParams(temperature=0.9, presence_penalty=1.0, frequency_penalty=0.8),
    "greedy with penalties": SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=1.5),
    "bias": SamplingParams(temperature=1.0, logit_bias={40: 5.0, 41: -100.0}),
    "late end": SamplingParams(temperature=1.0, min_tokens=12, stop_token_ids=tuple(range(2, 40))),
}


def seeded(name: str, *, seed: int = 5, block_length: int = 1) -> SamplingParams:
    return replace(SAMPLING[name], seed=seed, block_length=block_length, max_tokens=NUM_NEW)


@cache
def scripted_text(name: str) -> list[int]:
    """Decoded one token at a time, alone."""
    return decode_one(make_scripted_engine(), make_request("a", PROMPT, seeded(name))).token_ids


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("block_length", [2, 5, 16])
def test_the_text_does_not_depend_on_the_block_length(name: str, block_length: int) -> None:
    request = make_request("a", PROMPT, seeded(name, block_length=block_length))
    answer = decode_one(make_scripted_engine(), request)
    assert answer.token_ids == scripted_text(name)


@pytest.mark.parametrize("num_blocks", [22, 200])
def test_the_text_does_not_depend_on_the_batch(num_blocks: int) -> None:
    reader = Reader(make_scripted_engine(Setup(num_blocks=num_blocks, max_batched_tokens=29)))
    draw = random.Random(num_blocks)
    for name in SAMPLING:
        reader.add(make_request(name, PROMPT, seeded(name, block_length=draw.choice([1, 3, 16]))))
        filler = [draw.randrange(2, 60) for _ in range(draw.randrange(1, 20))]
        reader.add(make_request(f"filler of {name}", filler, SamplingParams(max_tokens=10)))
        reader.step()
    answers = reader.drain()
    assert {name: answers[name].token_ids for name in SAMPLING} == {name: scripted_text(name) for name in SAMPLING}


def test_sampled_drafts_are_accepted_too() -> None:
    """Guards the tests above: without accepted drafts they would compare AR with AR."""
    answers = [
        decode_one(make_scripted_engine(), make_request("a", PROMPT, seeded("plain", seed=seed, block_length=16)))
        for seed in range(8)
    ]
    assert sum(len(a.token_ids) for a in answers) > 1.3 * sum(a.stats.num_forward_passes for a in answers)


@pytest.mark.parametrize("name", ["plain", "cool and cut", "greedy with penalties"])
def test_a_real_model_draws_the_same_text_with_a_right_draft_and_without(name: str) -> None:
    alone = decode_one(make_engine("qwen2"), make_request("a", PROMPT, seeded(name)))
    request = make_request("a", PROMPT, seeded(name, block_length=16), prediction_ids=alone.token_ids)
    other = make_request("b", PROMPT[:4], SamplingParams(max_tokens=9, block_length=5))
    answer = decode(make_engine("qwen2"), [other, request])["a"]
    assert answer.token_ids == alone.token_ids
    assert answer.stats.num_forward_passes < alone.stats.num_forward_passes


@pytest.mark.parametrize("block_length", [1, 16])
def test_seed_and_choice_index_tell_texts_apart(block_length: int) -> None:
    params = {seed: seeded("plain", seed=seed, block_length=block_length) for seed in (5, 6)}
    texts = [
        decode_one(make_scripted_engine(), make_request("a", PROMPT, params[seed], choice_index=choice)).token_ids
        for seed, choice in ((5, 0), (5, 1), (6, 0), (5, 0))
    ]
    assert texts[0] == texts[3]
    assert len({tuple(text) for text in texts}) == 3


def test_without_a_seed_each_request_gets_its_own() -> None:
    params = SamplingParams(max_tokens=NUM_NEW)
    answers = decode(make_engine("llama"), [make_request(name, PROMPT, params) for name in "ab"])
    assert answers["a"].token_ids != answers["b"].token_ids


def plain_logprobs(prompt: tuple[int, ...], answer: Answer) -> torch.Tensor:
    """[tokens, V] of a forward pass of transformers over the finished text."""
    with torch.inference_mode():
        logits = plain_model("llama")(torch.tensor([[*prompt, *answer.token_ids]])).logits[0]
    logprobs: torch.Tensor = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return logprobs


@pytest.mark.parametrize("block_length", [1, 16])
def test_logprobs_are_those_of_a_plain_forward_pass(block_length: int) -> None:
    params = SamplingParams(temperature=1.3, seed=3, max_tokens=NUM_NEW, logprobs=4, block_length=block_length)
    draft = decode_one(make_engine("llama"), make_request("a", PROMPT, params)).token_ids
    silent = make_request("silent", PROMPT[:3], SamplingParams(max_tokens=NUM_NEW))
    fewer = make_request("fewer", PROMPT[:5], SamplingParams(max_tokens=NUM_NEW, logprobs=0))
    answers = decode(make_engine("llama"), [silent, fewer, make_request("a", PROMPT, params, prediction_ids=draft)])
    answer = answers["a"]
    expected = plain_logprobs(PROMPT, answer)
    best = expected.topk(4)
    own = expected.gather(1, torch.tensor(answer.token_ids)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor([one.logprob for one in answer.logprobs]), own, atol=1e-4, rtol=0)
    assert [list(one.top_ids) for one in answer.logprobs] == best.indices.tolist()
    top = torch.tensor([one.top_logprobs for one in answer.logprobs])
    torch.testing.assert_close(top, best.values, atol=1e-4, rtol=0)
    assert answers["silent"].logprobs == []
    assert {one.top_ids for one in answers["fewer"].logprobs} == {()}


@torch.inference_mode()
def plain_last_logits(text: list[int]) -> torch.Tensor:
    """[V] of transformers after the last token of a text."""
    logits: torch.Tensor = plain_model("llama")(torch.tensor([text])).logits[0, -1]
    return logits


@pytest.mark.parametrize("strength", [1.5, -1.5])  # the negative one makes texts that say the same word in a row
def test_penalties_count_the_output_before_each_token_and_nothing_else(strength: float) -> None:
    """Against a loop that asks transformers for one token at a time and counts by hand."""
    params = SamplingParams(
        temperature=0, presence_penalty=strength, frequency_penalty=strength, max_tokens=NUM_NEW, ignore_eos=True
    )
    output: list[int] = []
    for _ in range(NUM_NEW):
        counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=VOCAB_SIZE)
        scores = plain_last_logits([*PROMPT, *output]) - counts * strength - (counts > 0) * strength
        output.append(int(scores.argmax()))
    answer = decode_one(make_engine("llama"), make_request("a", PROMPT, params, prediction_ids=output))
    assert answer.token_ids == output
    assert answer.stats.num_forward_passes < NUM_NEW


@pytest.mark.parametrize("block_length", [1, 16])
def test_a_token_is_drawn_with_the_noise_of_its_output_position(block_length: int) -> None:
    """Against a loop over plain forward passes; position 0 is the first token of the output."""
    params = SamplingParams(seed=11, max_tokens=NUM_NEW, ignore_eos=True, block_length=block_length)
    output: list[int] = []
    for position in range(NUM_NEW):
        row = RowSampling(
            params=params,
            named=NamedTokens.of(params),
            seed=11,
            choice_index=2,
            num_positions=1,
            first_output_position=position,
        )
        batch = SamplingBatch.build([row], torch.device("cpu"))
        output.append(int(sample(plain_last_logits([*PROMPT, *output])[None], batch)))
    request = make_request("a", PROMPT, params, choice_index=2, prediction_ids=output)
    assert decode_one(make_engine("llama"), request).token_ids == output


@pytest.mark.parametrize("block_length", [1, 4, 16])
def test_a_stop_token_can_end_the_output_from_min_tokens_on(block_length: int) -> None:
    stop = 40
    params = SamplingParams(
        temperature=0, min_tokens=5, stop_token_ids=(stop,), logit_bias={stop: 100.0}, block_length=block_length
    )
    answer = decode_one(make_scripted_engine(), make_request("a", PROMPT, params))
    assert (answer.token_ids.index(stop), len(answer.token_ids)) == (5, 6)
