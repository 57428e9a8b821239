"""Laws of sampling: exact distribution, one sample per seed whatever the batch, Jacobi equal to AR."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from cllm_core.engine.named_tokens import NamedTokens
from cllm_core.engine.sampling import largest, sample
from cllm_core.engine.sampling_batch import RowSampling, SamplingBatch
from cllm_core.engine.token_counts import TokenCounts, WindowCounts
from cllm_core.request import SamplingParams

CPU = torch.device("cpu")


def make_row(
    params: SamplingParams,
    *,
    seed: int = 0,
    choice: int = 0,
    positions: int = 1,
    first: int = 0,
    prompt: int = 1,
    stop: tuple[int, ...] = (),
    text: Sequence[int] = (),
) -> RowSampling:
    """`text`: prompt, output and draft that the positions see; zeros where it is left out."""
    return RowSampling(
        params=params,
        named=NamedTokens.of(params, stop),
        seed=seed,
        choice_index=choice,
        num_positions=positions,
        first_output_position=first,
        counts=window_counts(params, text or [0] * (prompt + first + positions - 1), prompt, prompt + first),
    )


def window_counts(params: SamplingParams, text: Sequence[int], prompt: int, text_end: int) -> WindowCounts | None:
    if not params.has_penalties:
        return None
    counts = TokenCounts(text[:prompt] if params.penalizes_repetition else ())
    counts.add(text[prompt:text_end])
    return counts.of_window(text[text_end:])


def make_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits: Tensor, *rows: RowSampling) -> Tensor:
    return sample(logits, SamplingBatch.build(rows, CPU))


@pytest.mark.parametrize("vocab_size", [1, 100, 128, 1000, 1280])
@pytest.mark.parametrize("num_values", [2, 5, 10**6])
def test_the_largest_score_is_the_first_of_equal_ones_whatever_the_size(vocab_size: int, num_values: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size + num_values)
    scores = torch.randint(num_values, (50, vocab_size), generator=generator).float() - num_values / 2
    scores[::5, : vocab_size // 2] = -math.inf  # as a grammar's mask
    expected = [row.index(max(row)) for row in scores.tolist()]
    assert largest(scores).tolist() == expected


def assert_distributed(tokens: Tensor, probabilities: np.ndarray) -> None:
    """Chi-square test at the 0.1 % level; impossible tokens must not occur."""
    observed = np.bincount(tokens.numpy(), minlength=len(probabilities))
    possible = probabilities > 0
    assert observed[~possible].sum() == 0
    expected = probabilities[possible] / probabilities[possible].sum() * len(tokens)
    assert stats.chisquare(observed[possible], expected).pvalue > 0.001


def truncate(probabilities: np.ndarray, keep: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    ordered = np.sort(probabilities)[::-1]
    return np.where(probabilities >= ordered[keep(ordered)][-1], probabilities, 0)


PROBABILITIES = np.array([0.3, 0.02, 0.25, 0.08, 0.15, 0.001, 0.099, 0.1])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), PROBABILITIES),
        (SamplingParams(temperature=0.5), PROBABILITIES**2),
        (SamplingParams(temperature=2.0), PROBABILITIES**0.5),
        (SamplingParams(top_k=3), truncate(PROBABILITIES, lambda ordered: np.arange(8) < 3)),
        (SamplingParams(top_p=0.75), truncate(PROBABILITIES, lambda ordered: ordered.cumsum() - ordered < 0.75)),
        (SamplingParams(min_p=0.3), truncate(PROBABILITIES, lambda ordered: ordered >= 0.3 * ordered[0])),
        (SamplingParams(top_k=4, top_p=0.6, min_p=0.1), truncate(PROBABILITIES, lambda ordered: np.arange(8) < 2)),
        (SamplingParams(logit_bias={5: 5.0}), PROBABILITIES * np.where(np.arange(8) == 5, math.exp(5.0), 1.0)),
    ],
    ids=["plain", "cold", "hot", "top_k", "top_p", "min_p", "all_truncations", "bias"],
)
def test_samples_follow_the_exact_probabilities(params: SamplingParams, expected: np.ndarray) -> None:
    logits = torch.tensor(np.log(PROBABILITIES), dtype=torch.float32).expand(20_000, 8)
    assert_distributed(draw(logits, make_row(params, seed=42, positions=20_000)), expected)


@pytest.mark.parametrize("varied", ["seed", "choice"])
def test_samples_of_different_seeds_and_choices_follow_the_exact_probabilities(varied: str) -> None:
    logits = torch.tensor(np.log(PROBABILITIES), dtype=torch.float32).expand(4000, 8)
    rows = [make_row(SamplingParams(), first=3, **{varied: number}) for number in range(4000)]  # type: ignore[arg-type]
    assert_distributed(draw(logits, *rows), PROBABILITIES)


def test_samples_of_neighbouring_positions_are_independent() -> None:
    logits = torch.tensor(np.log(PROBABILITIES), dtype=torch.float32).expand(40_000, 8)
    tokens = draw(logits, make_row(SamplingParams(), seed=1, positions=40_000))
    assert_distributed(tokens[:-1:2] * 8 + tokens[1::2], np.outer(PROBABILITIES, PROBABILITIES).flatten())


def test_samples_of_a_real_vocabulary_follow_the_exact_probabilities() -> None:
    weights = 1 / np.arange(1, 49_153)
    logits = torch.tensor(np.log(weights), dtype=torch.float32).expand(2000, 49_152)
    tokens = draw(logits, make_row(SamplingParams(), seed=9, positions=2000))
    octaves = np.floor(np.log2(np.arange(1, 49_153))).astype(int)
    assert_distributed(torch.tensor(octaves)[tokens], np.bincount(octaves, weights / weights.sum()))


MIXED = (
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(top_k=20, presence_penalty=1.0),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, top_p=0.1),
    SamplingParams(temperature=2.0, min_p=0.1, logit_bias={3: 4.0}),
    SamplingParams(min_tokens=3, frequency_penalty=0.5, repetition_penalty=1.2, top_p=0.8),
)


@pytest.mark.parametrize("vocab_size", [50, 50_257])
def test_a_row_gets_the_same_tokens_alone_and_in_any_batch(vocab_size: int) -> None:
    texts = torch.randint(0, 50, (len(MIXED), 30), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [
        make_row(
            params,
            seed=index,
            positions=index + 1,
            first=index,
            prompt=4,
            stop=(1, 7),
            text=texts[index][: 4 + 2 * index],
        )
        for index, params in enumerate(MIXED)
    ]
    logits = make_logits(sum(row.num_positions for row in rows), vocab_size).split([row.num_positions for row in rows])

    for order in (range(len(rows)), reversed(range(len(rows)))):
        indices = list(order)
        batch = SamplingBatch.build([rows[index] for index in indices], CPU)
        together = sample(torch.cat([logits[index] for index in indices]), batch)
        for index, tokens in zip(
            indices, together.split([rows[index].num_positions for index in indices]), strict=True
        ):
            assert torch.equal(draw(logits[index], rows[index]), tokens)


def test_greedy_rows_ignore_truncation_noise_and_their_neighbours() -> None:
    logits = make_logits(3, 1000)
    greedy = SamplingParams(temperature=0.0, top_k=5, top_p=0.2, min_p=0.5)
    rows = (make_row(greedy), make_row(SamplingParams(temperature=5.0)), make_row(greedy, seed=8))
    assert torch.equal(draw(logits, *rows)[[0, 2]], logits.argmax(-1)[[0, 2]])


def test_equal_logits_resolve_to_the_lowest_token_where_greedy() -> None:
    assert draw(torch.zeros(1, 50_257), make_row(SamplingParams(temperature=0.0))).tolist() == [0]


def model(text: list[int]) -> Tensor:
    """A language model over 12 tokens whose prediction depends on the last two tokens: [12] logits."""
    return make_logits(12, seed=text[-2] * 12 + text[-1], scale=2.0)


def decode(params: SamplingParams, prompt: list[int], *, seed: int, block_length: int, max_tokens: int) -> list[int]:
    """Output tokens by Jacobi iteration in windows of block_length; 1 is AR."""
    output: list[int] = []
    draft = [0] * (block_length - 1)
    while len(output) < max_tokens:
        text = [*prompt, *output, *draft]
        starts = range(len(text) - len(draft), len(text) + 1)
        row = make_row(
            params,
            seed=seed,
            positions=block_length,
            first=len(output),
            prompt=len(prompt),
            stop=(0, 1, 2, 3),
            text=text,
        )
        predicted = draw(torch.stack([model(text[:end]) for end in starts]), row).tolist()
        matched = next((i for i, token in enumerate(draft) if token != predicted[i]), len(draft))
        output += predicted[: matched + 1]
        draft = (predicted[matched + 1 :] + [0] * block_length)[: block_length - 1]
    return output[:max_tokens]


@pytest.mark.parametrize("block_length", [2, 5, 16])
@pytest.mark.parametrize("params", [*MIXED, SamplingParams(presence_penalty=2.0, frequency_penalty=-0.5)])
def test_jacobi_reaches_the_sample_that_ar_draws(params: SamplingParams, block_length: int) -> None:
    for seed in range(3):
        settings = {"seed": seed, "max_tokens": 40}
        expected = decode(params, [5, 6, 5], block_length=1, **settings)
        assert decode(params, [5, 6, 5], block_length=block_length, **settings) == expected


def test_each_position_counts_the_text_up_to_the_token_it_follows() -> None:
    """Zero logits and a presence penalty: greedy takes the lowest token that is not in the output yet."""
    params = SamplingParams(temperature=0.0, presence_penalty=1.0)
    row = make_row(params, positions=4, first=1, prompt=1, text=[5, 0, 1, 2, 3])
    assert draw(torch.zeros(4, 6), row).tolist() == [1, 2, 3, 4]


def test_repetition_counts_the_prompt_and_output_penalties_do_not() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    output_only = make_row(SamplingParams(temperature=0.0, presence_penalty=2.0), first=1, text=[0, 1])
    prompt_too = make_row(SamplingParams(temperature=0.0, repetition_penalty=9.0), first=1, text=[0, 1])
    assert draw(logits, output_only).tolist() == [0]
    assert draw(logits, prompt_too).tolist() == [2]


def test_tokens_that_end_the_output_are_impossible_before_min_tokens_only() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]]).expand(6, 4)
    row = make_row(SamplingParams(temperature=0.0, min_tokens=5), positions=6, first=2, stop=(1, 2))
    assert draw(logits, row).tolist() == [3, 3, 3, 1, 1, 1]


def test_tokens_masked_by_the_caller_are_never_drawn() -> None:
    logits = make_logits(500, 40)
    logits[:, 5:] = -torch.inf
    params = SamplingParams(temperature=50.0, top_p=0.999, logit_bias={30: 100.0}, frequency_penalty=-2.0)
    tokens = draw(logits, make_row(params, positions=500, text=[i % 40 for i in range(500)]))
    assert tokens.unique().tolist() == [0, 1, 2, 3, 4]


def test_logits_are_not_changed() -> None:
    logits = make_logits(sum(range(1, 8)), 60)
    before = logits.clone()
    rows = [make_row(params, positions=index + 1, stop=(1,)) for index, params in enumerate(MIXED)]
    draw(logits, *rows)
    assert torch.equal(logits, before)


def test_nothing_in_a_step_waits_for_the_device() -> None:
    """On the meta device there are no values, so whatever would read one back fails."""
    meta = torch.device("meta")
    rows = [make_row(params, positions=3, stop=(1,)) for params in MIXED]
    assert sample(torch.empty(21, 60, device=meta), SamplingBatch.build(rows, meta)).shape == (21,)


@pytest.mark.gpu
def test_cuda_samples_equal_cpu_samples_but_for_near_ties() -> None:
    logits = make_logits(7 * 64, 50_257)
    text = torch.randint(0, 50_257, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [make_row(params, seed=index, positions=64, stop=(1,), text=text) for index, params in enumerate(MIXED)]
    on_cuda = sample(logits.cuda(), SamplingBatch.build(rows, torch.device("cuda"))).cpu()
    assert (draw(logits, *rows) != on_cuda).sum() <= 2
