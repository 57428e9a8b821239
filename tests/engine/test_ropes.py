"""With a rope that follows the length of a text, an answer depends neither on company nor on chunks, n or the cache."""

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cllm_core import LLM, SamplingParams
from tests.checkpoints import VOCAB_SIZE, build_tokenizer
from tests.models.test_ropes import DYNAMIC, LONGROPE, ORIGINAL, model_with

CONTEXT = 128  # more than the 32 tokens that the models were first trained with
MAX_ERROR = 1e-3  # nats
NUM_TOKENS = 24  # the outputs of short prompts go on beyond those 32

_draw = random.Random(5)
PROMPTS = [[_draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (14, 90, 25)]


@dataclass(frozen=True)
class Served:
    """What a prompt brought."""

    token_ids: tuple[int, ...]
    logprobs: torch.Tensor


@pytest.fixture(scope="module", params=["longrope", "dynamic"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 512 positions, or of 32 that its rope is stretched from."""
    folder = tmp_path_factory.mktemp(request.param)
    model = model_with(LONGROPE) if request.param == "longrope" else model_with(DYNAMIC, max_positions=ORIGINAL)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def serve(folder: Path, *, block_length: int = 16, max_batched_tokens: int = 256, context: int = CONTEXT) -> LLM:
    return LLM(
        str(folder),
        device="cpu",
        dtype="float32",
        block_length=block_length,
        adaptive_block_length=False,
        max_model_len=context,
        max_batched_tokens=max_batched_tokens,
        max_num_seqs=8,
        num_cache_blocks=64,
    )


def answers(llm: LLM, prompts: list[list[int]], *, num_tokens: int = NUM_TOKENS) -> list[Served]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, prompt_logprobs=0, ignore_eos=True)
    results = llm.generate(prompts, params, progress=False)
    return [
        Served(output.token_ids, torch.tensor([entry.logprob for entry in output.prompt_logprobs]))
        for output in (result.outputs[0] for result in results)
    ]


def assert_same(found: list[Served], expected: list[Served]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=MAX_ERROR, rtol=0)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Served]:
    """Every prompt by itself, one token at a time."""
    llm = serve(folder, block_length=1)
    return [answers(llm, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("block_length", [1, 16])
@pytest.mark.parametrize("max_batched_tokens", [10, 256])
def test_company_chunks_and_windows_change_nothing(
    folder: Path, alone: list[Served], block_length: int, max_batched_tokens: int
) -> None:
    llm = serve(folder, block_length=block_length, max_batched_tokens=max_batched_tokens)
    assert_same(answers(llm, PROMPTS), alone)


def test_a_cached_beginning_changes_nothing(folder: Path, alone: list[Served]) -> None:
    llm = serve(folder)
    answers(llm, [[*PROMPTS[0], *PROMPTS[1]], PROMPTS[1]])
    assert_same(answers(llm, PROMPTS), alone)


def test_a_context_within_the_first_length_keeps_transformers_own_numbers(
    folder: Path, alone: list[Served], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = answers(serve(folder, context=ORIGINAL), PROMPTS[:1], num_tokens=16)[0]
    assert f"frequencies as for a text of {ORIGINAL} tokens" in caplog.text
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(PROMPTS[:1])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(PROMPTS[0][1:])[:, None])[:, 0]
    torch.testing.assert_close(found.logprobs, expected, atol=MAX_ERROR, rtol=0)
    assert not torch.allclose(found.logprobs, alone[0].logprobs, atol=0.01)
