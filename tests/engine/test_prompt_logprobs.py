"""Log-probabilities of a prompt are those of one forward pass of transformers over it, however it was computed."""

import random
from functools import cache

import pytest
import torch

from cllm_core.request import RequestOutput, SamplingParams, TokenLogprobs
from tests.checkpoints import VOCAB_SIZE
from tests.engine.factories import Reader, Setup, make_engine, make_request, plain_model

NUM_TOP = 3
MAX_ERROR = 1e-4  # nats: the two add in another order
SCORED = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=NUM_TOP)

Prompt = tuple[int, ...]


@cache
def prompts() -> list[Prompt]:
    draw = random.Random(4)
    stem = tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(30))
    return [stem[:1], stem[:2], stem, (*stem, 9, 8), (*stem[:20], *stem[:20])]


def expected(prompt: Prompt) -> torch.Tensor:
    """[L - 1, V] log-probabilities after each token but the last."""
    with torch.inference_mode():
        logits: torch.Tensor = plain_model("llama")(torch.tensor([prompt])).logits
    return logits[0, :-1].log_softmax(-1)


def assert_scores(prompt: Prompt, found: tuple[TokenLogprobs, ...] | None, *, num_top: int = NUM_TOP) -> None:
    assert found is not None
    assert len(found) == len(prompt) - 1
    for token_id, row, entry in zip(prompt[1:], expected(prompt), found, strict=True):
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=MAX_ERROR)
        assert entry.top_logprobs == pytest.approx(row.topk(num_top).values.tolist(), abs=MAX_ERROR)
        assert [row[top].item() for top in entry.top_ids] == pytest.approx(entry.top_logprobs, abs=MAX_ERROR)


def outputs_of(setup: Setup, params: SamplingParams = SCORED, *, num_rounds: int = 1) -> list[list[RequestOutput]]:
    """Outputs of each prompt, in the last of some rounds on one engine."""
    reader = Reader(make_engine("llama", setup))
    for _ in range(num_rounds):
        outputs: list[list[RequestOutput]] = [[] for _ in prompts()]
        for index, prompt in enumerate(prompts()):
            reader.add(make_request(str(index), prompt, params))
        while reader.engine.has_work():
            for output in reader.step():
                outputs[int(output.request_id)].append(output)
    return outputs


@pytest.mark.parametrize("budget", [8, 13, 200])
@pytest.mark.parametrize("block_length", [1, 16])
def test_prompt_logprobs_equal_one_forward_pass(budget: int, block_length: int) -> None:
    setup = Setup(max_batched_tokens=budget, block_length=block_length)
    for prompt, (first, *others) in zip(prompts(), outputs_of(setup), strict=True):
        assert_scores(prompt, first.prompt_logprobs)
        assert all(output.prompt_logprobs is None for output in others)


def test_a_cached_prefix_is_computed_again_where_it_has_to_be_scored() -> None:
    outputs = outputs_of(Setup(prefix_caching=True), num_rounds=2)
    for prompt, (first, *_) in zip(prompts(), outputs, strict=True):
        assert_scores(prompt, first.prompt_logprobs)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_neither_loses_nor_repeats_any(prefix_caching: bool) -> None:
    """An older text grows and takes the blocks of a prompt that is half read."""
    setup = Setup(num_blocks=14, max_num_seqs=2, max_batched_tokens=4, block_length=1, prefix_caching=prefix_caching)
    reader = Reader(make_engine("llama", setup))
    reader.add(make_request("old", prompts()[2][:4], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)))
    while len(reader.answers["old"].token_ids) < 18:
        reader.step()
    reader.add(make_request("scored", prompts()[2], SCORED))
    outputs = [output for _ in range(200) for output in reader.step() if output.request_id == "scored"]
    assert outputs[0].stats.num_preemptions > 0
    assert outputs[0].stats.num_cached_tokens == 0  # blocks of its own that it found again are no gain
    assert_scores(prompts()[2], outputs[0].prompt_logprobs)


def test_no_output_tokens_may_be_wanted() -> None:
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    for prompt, outputs in zip(prompts(), outputs_of(Setup(max_batched_tokens=16), params), strict=True):
        (only,) = outputs
        assert (only.token_ids, only.finish_reason) == ((), "length")
        assert only.stats.num_forward_passes == 0
        assert_scores(prompt, only.prompt_logprobs, num_top=0)


def test_a_prompt_may_fill_the_context_where_no_output_is_wanted() -> None:
    prompt = prompts()[-1]
    reader = Reader(make_engine("llama", Setup(max_model_len=len(prompt))))
    reader.add(make_request("0", prompt, SamplingParams(max_tokens=0, prompt_logprobs=NUM_TOP)))
    reader.drain()
    assert reader.answers["0"].finish_reason == "length"


def test_others_in_the_batch_get_what_they_get_alone() -> None:
    reader = Reader(make_engine("llama"))
    for index, prompt in enumerate(prompts()):
        params = SCORED if index % 2 else SamplingParams(temperature=0, max_tokens=6, logprobs=2)
        reader.add(make_request(str(index), prompt, params))
    together = [answer.token_ids for answer in reader.drain().values()]
    assert together == [[token for output in one for token in output.token_ids] for one in outputs_of(Setup())]
