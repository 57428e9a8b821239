"""Tokens chosen by the kernels are those of the tensor code, for every instruction set."""

import math

import pytest
import torch
from torch import Tensor

from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.engine.named_tokens import NamedTokens
from cllm_core.engine.sampling import sample
from cllm_core.engine.sampling_batch import RowSampling, SamplingBatch
from cllm_core.request import SamplingParams

CPU = torch.device("cpu")
SETTINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.05),
    SamplingParams(temperature=30.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=900),
    SamplingParams(top_k=10**6),
    SamplingParams(top_p=0.01),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.9999, temperature=3.0),
    SamplingParams(min_p=0.01),
    SamplingParams(min_p=1.0),
    SamplingParams(top_k=30, top_p=0.8, min_p=0.02),
    SamplingParams(top_k=900, top_p=0.99, temperature=5.0),
)


def make_rows(params: SamplingParams, num_rows: int) -> list[RowSampling]:
    return [
        RowSampling(params=params, named=NamedTokens.of(params), seed=seed, num_positions=1, first_output_position=seed)
        for seed in range(num_rows)
    ]


def draw(kernels: Kernels | None, logits: Tensor, params: SamplingParams) -> Tensor:
    batch = SamplingBatch.build(make_rows(params, len(logits)), CPU)
    return sample(logits, batch, kernels)


def make_logits(vocab_size: int, *, scale: float, num_rows: int = 64) -> Tensor:
    """With a row's end that is not the next one's beginning, as where the vocabulary is rounded up."""
    generator = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(num_rows, vocab_size + 5, generator=generator) * scale)[:, :vocab_size]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize(("vocab_size", "scale"), [(1, 1.0), (50, 3.0), (1000, 0.5), (4099, 4.0), (4096, 10.0)])
def test_drawn_tokens_are_those_of_the_tensor_code(
    kernels: Kernels, vocab_size: int, scale: float, params: SamplingParams
) -> None:
    logits = make_logits(vocab_size, scale=scale)
    different = draw(kernels, logits, params) != draw(None, logits, params)
    # The last token that top-p keeps may be another where the sum before it rounds to the limit.
    assert different.sum() <= (params.top_p < 1)


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_masked_tokens_are_never_drawn_and_equal_ones_resolve_alike(kernels: Kernels, params: SamplingParams) -> None:
    logits = torch.randint(4, (64, 700), generator=torch.Generator().manual_seed(0)).float()
    logits[:, ::2] = -math.inf
    logits[::3, 9:] = -math.inf
    drawn = draw(kernels, logits, params)
    assert (drawn % 2 == 1).all()
    assert (drawn[::3] < 9).all()
    assert (drawn != draw(None, logits, params)).sum() <= (params.top_p < 1)


def test_a_row_that_allows_nothing_gives_some_token(kernels: Kernels) -> None:
    assert draw(kernels, torch.full((2, 100), -math.inf), SamplingParams(top_p=0.9)).tolist() == [0, 0]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_a_row_gets_the_same_token_alone_and_on_any_number_of_threads(kernels: Kernels, params: SamplingParams) -> None:
    logits = make_logits(5000, scale=2.0, num_rows=9)
    rows = make_rows(params, 9)
    torch.set_num_threads(2)
    try:
        together = sample(logits, SamplingBatch.build(rows, CPU), kernels)
    finally:
        torch.set_num_threads(1)
    for index, row in enumerate(rows):
        alone = sample(logits[index : index + 1], SamplingBatch.build([row], CPU), kernels)
        assert alone[0] == together[index]


@pytest.mark.parametrize("vocab_size", [1, 50, 1000, 4099])
def test_the_likeliest_token_is_the_first_of_the_largest_logits(kernels: Kernels, vocab_size: int) -> None:
    logits = make_logits(vocab_size, scale=1.0).round()  # many are equal
    logits[0] = -math.inf
    logits[1, :-1] = -math.inf
    assert torch.equal(kernels.largest(logits), logits.argmax(-1))
