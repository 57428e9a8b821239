"""The laws of exactness on a model that speaks: the embedded model, plain questions, fp32 and bf16."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cllm_core.config import DTypeName, EngineConfig
from cllm_core.engine.build import build_engine
from cllm_core.models.embedded import EMBEDDED_NAME, embedded_folder, has_embedded
from cllm_core.request import SamplingParams
from tests.engine.factories import Answer, decode, greedy_ar, make_request

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not has_embedded(), reason="the package of the embedded model is not installed"),
]

NUM_NEW = 64
BLOCK_LENGTHS = (1, 2, 5, 16, 32)
# In bf16 a logit of size 16 to 32 is rounded to 1/8, and a few roundings add up on the way to it.
NEAR_TIE = 0.5

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three fruits that grow on trees.",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "What is 17 plus 25?",
    "Explain what a computer program is to a child.",
    "Who wrote Romeo and Juliet?",
    "List the days of the week.",
    "What should I pack for a week in the mountains?",
    "How does a bicycle stay upright?",
    "Translate 'good morning' into Spanish.",
    "Write a Python function that reverses a string.",
    "What is the difference between a lake and a pond?",
    "Give me a recipe for pancakes.",
    "Why do leaves turn red in autumn?",
    "Tell me a joke about a cat.",
    "How far is the Moon from the Earth?",
    "What makes bread rise?",
    "Write a polite email that declines an invitation.",
)


@pytest.fixture(autouse=True, scope="module")
def all_threads() -> Iterator[None]:
    """Tiny models run on one thread; this one is large enough to want more."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@cache
def folder() -> Path:
    return embedded_folder(lambda stage, fraction: None)


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    tokenizer = AutoTokenizer.from_pretrained(folder())
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]
    return tuple(tuple(tokenizer(text).input_ids) for text in texts)


@cache
def reference() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    return model


@cache
def expected() -> list[list[int]]:
    return [greedy_ar(reference(), prompt, NUM_NEW) for prompt in prompts()]


def jacobi(dtype: DTypeName, block_length: int) -> list[Answer]:
    config = EngineConfig(
        model=EMBEDDED_NAME, dtype=dtype, device="cpu", block_length=block_length, cache_memory_gib=0.5
    )
    engine = build_engine(config)
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW)
    requests = [make_request(str(index), prompt, params) for index, prompt in enumerate(prompts())]
    return list(decode(engine, requests).values())


@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_fp32_output_equals_transformers_greedy_generate(block_length: int) -> None:
    answers = jacobi("float32", block_length)
    assert [answer.token_ids for answer in answers] == expected()


@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_bf16_output_leaves_that_of_fp32_first_at_a_near_tie(block_length: int) -> None:
    answers = jacobi("bfloat16", block_length)
    for prompt, answer, text in zip(prompts(), answers, expected(), strict=True):
        if answer.token_ids != text:
            assert margin_at_first_difference(prompt, answer.token_ids, text) < NEAR_TIE


@torch.inference_mode()
def margin_at_first_difference(prompt: tuple[int, ...], found: list[int], text: list[int]) -> float:
    """Logit of the fp32 token minus that of the bf16 token, both in fp32."""
    index = next(i for i, (one, other) in enumerate(zip(found, text, strict=False)) if one != other)
    logits = reference()(torch.tensor([[*prompt, *text[:index]]])).logits[0, -1]
    return float(logits[text[index]] - logits[found[index]])
