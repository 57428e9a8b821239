"""The paged cache under tiny models of each architecture, against transformers' own attention over plain text."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cllm_core.models.paged import LayerSpec, RowSpan
from tests.architectures import Architecture
from tests.backends.factories import plain
from tests.checkpoints import ARCHITECTURES, SLIDING_WINDOW, VOCAB_SIZE
from tests.engine.factories import paged_model, plain_model

NUM_BLOCKS, BLOCK_SIZE = 64, 4


class Pages:
    """Texts over a paged model, each in blocks of random order, computed part by part."""

    def __init__(self, architecture: Architecture, *, seed: int = 0) -> None:
        self.model = plain(paged_model(architecture))
        self.model.allocate_cache(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        self._free = random.Random(seed).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self._blocks: dict[int, list[int]] = {}

    def compute(self, parts: Sequence[tuple[int, int, list[int]]]) -> list[Tensor]:
        """parts: (text number, position of the first token, tokens); returns the logits [tokens, V] of each."""
        spans, first_index = [], 0
        for number, first_position, tokens in parts:
            blocks = self._blocks.setdefault(number, [])
            while len(blocks) * BLOCK_SIZE < first_position + len(tokens):
                blocks.append(self._free.pop())
            spans.append(RowSpan(first_index, len(tokens), first_position, tuple(blocks)))
            first_index += len(tokens)
        ids = torch.tensor([token for _, _, tokens in parts for token in tokens])
        positions = torch.cat([torch.arange(span.first_position, span.context_length) for span in spans])
        logits = self.model.forward(ids, positions, spans, torch.arange(first_index))
        return list(logits.split([span.num_tokens for span in spans]))


def random_text(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(3, VOCAB_SIZE) for _ in range(length)]


@torch.inference_mode()
def plain_logits(architecture: Architecture, text: list[int]) -> Tensor:
    logits: Tensor = plain_model(architecture)(torch.tensor([text])).logits[0]
    return logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_any_length_get_the_logits_of_a_plain_forward(architecture: Architecture) -> None:
    draw = random.Random(1)
    texts = [random_text(draw, length) for length in (1, 3, 4, 5, 17, 2, 40, 63)]
    found = Pages(architecture).compute([(number, 0, text) for number, text in enumerate(texts)])
    for text, logits in zip(texts, found, strict=True):
        torch.testing.assert_close(logits, plain_logits(architecture, text), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_computed_in_parts_gets_the_logits_of_the_whole(architecture: Architecture) -> None:
    """More tokens than the sliding window, in steps shared with other texts that are elsewhere in theirs."""
    draw = random.Random(2)
    texts = [random_text(draw, length) for length in (3 * SLIDING_WINDOW, 50, 33)]
    pages, done = Pages(architecture), [0, 0, 0]
    found: list[list[Tensor]] = [[], [], []]
    while any(done[number] < len(text) for number, text in enumerate(texts)):
        parts = []
        for number, text in enumerate(texts):
            size = draw.choice([0, 1, 2, 7, 16])
            if chunk := text[done[number] : done[number] + size]:
                parts.append((number, done[number], chunk))
        for (number, _, chunk), logits in zip(parts, pages.compute(parts) if parts else [], strict=True):
            found[number].append(logits)
            done[number] += len(chunk)
    for text, pieces in zip(texts, found, strict=True):
        torch.testing.assert_close(torch.cat(pieces), plain_logits(architecture, text), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rejected_tokens_leave_no_trace_once_they_are_written_over(architecture: Architecture) -> None:
    draw = random.Random(3)
    text, wrong = random_text(draw, 20), random_text(draw, 9)
    pages = Pages(architecture)
    pages.compute([(0, 0, text[:8])])
    pages.compute([(0, 8, wrong)])
    (logits,) = pages.compute([(0, 8, text[8:])])
    torch.testing.assert_close(logits, plain_logits(architecture, text)[8:], atol=2e-4, rtol=1e-4)


def test_a_block_shared_by_two_texts_serves_both() -> None:
    draw = random.Random(4)
    stem = random_text(draw, 2 * BLOCK_SIZE)
    ends = [random_text(draw, 5), random_text(draw, 3)]
    pages = Pages("llama")
    pages.compute([(0, 0, stem)])
    pages._blocks[1] = list(pages._blocks[0])
    found = pages.compute([(number, len(stem), end) for number, end in enumerate(ends)])
    for end, logits in zip(ends, found, strict=True):
        torch.testing.assert_close(logits, plain_logits("llama", stem + end)[len(stem) :], atol=2e-4, rtol=1e-4)


def test_logits_come_for_the_sampled_tokens_only_and_in_their_order() -> None:
    text = random_text(random.Random(5), 9)
    pages = Pages("qwen2")
    span = RowSpan(0, 9, 0, (5, 0, 9))
    logits = pages.model.forward(torch.tensor(text), torch.arange(9), [span], torch.tensor([8, 2]))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, plain_logits("qwen2", text)[[8, 2]], atol=2e-4, rtol=1e-4)


def test_the_cache_takes_what_it_says() -> None:
    model = plain(paged_model("qwen2-sliding"))
    num_bytes = model.allocate_cache(num_blocks=10, block_size=BLOCK_SIZE)
    assert model.layers == [LayerSpec(num_kv_heads=2, key_size=16, value_size=16)] * 3
    assert num_bytes == 10 * BLOCK_SIZE * model.cache_bytes_per_token
    assert model.cache_bytes_per_token == 3 * 2 * (16 + 16) * 4
