"""SamplingBatch holds what the rows use, no more, and misuse is refused with the numbers at fault."""

import random
import time
from dataclasses import replace

import pytest
import torch

from cllm_core.engine.named_tokens import NamedTokens
from cllm_core.engine.sampling import sample
from cllm_core.engine.sampling_batch import LogitBias, Penalties, RowSampling, SamplingBatch, Suppression
from cllm_core.engine.token_counts import TokenCounts
from cllm_core.request import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


def make_row(params: SamplingParams, *, positions: int = 2, first: int = 3, seed: int = 0) -> RowSampling:
    return RowSampling(
        params=params,
        named=NamedTokens.of(params, (99,)),
        seed=seed,
        num_positions=positions,
        first_output_position=first,
        counts=TokenCounts().of_window([1] * (positions - 1)) if params.has_penalties else None,
    )


def build(*rows: RowSampling) -> SamplingBatch:
    return SamplingBatch.build(rows, CPU)


def test_greedy_rows_without_processors_cost_an_argmax_and_nothing_else() -> None:
    batch = build(make_row(GREEDY), make_row(GREEDY))
    assert (batch.bias, batch.suppression, batch.penalties) == (None, None, None)
    assert (batch.draws, batch.max_token_id) == ((), -1)


def test_rows_are_grouped_by_the_truncations_they_use() -> None:
    top_p = SamplingParams(top_p=0.5)
    batch = build(make_row(top_p), make_row(GREEDY), make_row(SamplingParams()), make_row(top_p, seed=1))
    assert [group.positions.tolist() for group in batch.draws] == [[0, 1, 6, 7], [4, 5]]
    assert [group.top_p is None for group in batch.draws] == [False, True]
    assert all(group.top_k is None and group.min_p is None for group in batch.draws)


def test_penalties_are_those_of_each_row_at_its_own_positions() -> None:
    penalized = SamplingParams(frequency_penalty=0.1)
    counted, other = TokenCounts(), TokenCounts()
    counted.add([7, 8, 7])
    rows = [
        make_row(GREEDY),
        replace(make_row(penalized, positions=3), counts=counted.of_window([8, 9])),
        replace(make_row(SamplingParams(presence_penalty=2.0), positions=1), counts=other.of_window([])),
        replace(make_row(SamplingParams(repetition_penalty=3.0)), counts=TokenCounts([4]).of_window([5])),
    ]
    penalties = build(*rows).penalties
    assert penalties is not None
    at = dict(zip(places(penalties), penalties.output_counts.tolist(), strict=True))
    assert at == {
        **{(2, 7): 2, (2, 8): 1, (2, 9): 0, (3, 7): 2, (3, 8): 2, (3, 9): 0, (4, 7): 2, (4, 8): 2, (4, 9): 1},
        **{(6, 4): 0, (6, 5): 0, (7, 4): 0, (7, 5): 1},
    }
    assert penalties.text_counts.tolist()[-4:] == [1, 0, 1, 1]
    assert penalties.frequency.tolist() == pytest.approx([0.1] * 9 + [0] * 4)
    assert penalties.repetition.tolist() == [1.0] * 9 + [3.0] * 4


def test_min_tokens_costs_nothing_once_reached() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=5)
    assert build(make_row(params, first=5)).suppression is None
    assert build(make_row(params, first=5)).max_token_id == -1
    assert build(make_row(params, first=4)).max_token_id == 99


def test_biases_and_suppressed_stops_are_those_of_each_row_at_its_own_positions() -> None:
    rng, rows, start = random.Random(0), [], 0
    biases: dict[tuple[int, int], float] = {}
    suppressed: set[tuple[int, int]] = set()
    for _ in range(40):
        bias = {token: rng.randint(-400, 400) / 4 for token in rng.sample(range(200), rng.choice([0, 0, 1, 7]))}
        params = SamplingParams(temperature=0, logit_bias=bias, min_tokens=rng.choice([0, 5]))
        row = make_row(params, positions=rng.randint(1, 6), first=rng.randint(0, 7))
        for offset in range(row.num_positions):
            biases |= {(start + offset, token): value for token, value in bias.items()}
            if row.first_output_position + offset < params.min_tokens:
                suppressed.add((start + offset, 99))
        rows.append(row)
        start += row.num_positions
    batch = build(*rows)
    assert batch.bias is not None
    assert dict(zip(places(batch.bias), batch.bias.values.tolist(), strict=True)) == biases
    assert batch.suppression is not None
    assert sorted(places(batch.suppression)) == sorted(suppressed)


def places(group: LogitBias | Suppression | Penalties) -> list[tuple[int, int]]:
    """Position and token of each entry."""
    return list(zip(group.positions.tolist(), group.token_ids.tolist(), strict=True))


def test_a_large_bias_costs_a_step_little() -> None:
    """A tuple for each token at each position took 75 ms of processor time in every step."""
    bias = {token: token / 100 for token in range(4096)}
    row = make_row(SamplingParams(temperature=0, logit_bias=bias, min_tokens=20), positions=16)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        batch = build(row)
        seconds.append(time.process_time() - started)
    assert batch.bias is not None
    assert len(batch.bias.values) == 16 * 4096
    assert min(seconds) < 0.015


@pytest.mark.parametrize(("signed", "unsigned"), [(-1, 2**64 - 1), (-(2**63), 2**63)])
def test_a_seed_may_be_given_signed_or_unsigned(signed: int, unsigned: int) -> None:
    (one,), (other,) = (build(make_row(SamplingParams(), seed=seed)).draws for seed in (signed, unsigned))
    assert torch.equal(one.keys, other.keys)


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 50), build()).shape == (0,)


@pytest.mark.parametrize(
    ("params", "logits", "message"),
    [
        (GREEDY, torch.zeros(3, 50), "3 rows, the batch 2 positions"),
        (SamplingParams(logit_bias={50: 1.0}), torch.zeros(2, 50), "token id 50 is outside"),
    ],
)
def test_input_that_does_not_fit_is_refused(params: SamplingParams, logits: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(logits, build(make_row(params)))
