"""Every processor against a slow reference in plain Python, and against Hugging Face transformers where it has one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from cllm_core.engine import processors

# Coarse logits make ties common; a fine tenth keeps different logits of clearly different probability.
LOGITS = st.lists(st.integers(-60, 60).map(lambda tenths: tenths / 10), min_size=1, max_size=40)
SHARE = st.floats(2.0**-10, 1.0, exclude_max=True, width=32)


def survivors(processed: Tensor) -> set[int]:
    """Token ids that were not removed from the only position."""
    return {token for token, logit in enumerate(processed[0].tolist()) if logit != -math.inf}


def ranked(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_exactly_the_first_k_by_logit_then_token_id(logits: list[float], top_k: int) -> None:
    processed = processors.keep_top_k(torch.tensor([logits]), torch.tensor([top_k]), top_k)
    assert survivors(processed) == set(ranked(logits)[:top_k])


@given(LOGITS, SHARE)
def test_top_p_keeps_the_smallest_prefix_that_reaches_p(logits: list[float], top_p: float) -> None:
    expected, mass = set[int](), 0.0
    for token in ranked(logits):
        assume(abs(mass - top_p) > 1e-5)
        if mass >= top_p:
            break
        expected.add(token)
        mass += softmax(logits)[token]
    assert survivors(processors.keep_top_p(torch.tensor([logits]), torch.tensor([top_p]))) == expected


@given(LOGITS, SHARE)
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(logits: list[float], min_p: float) -> None:
    ratios = [math.exp(logit - max(logits)) for logit in logits]
    assume(all(abs(math.log(ratio / min_p)) > 1e-4 for ratio in ratios))
    expected = {token for token, ratio in enumerate(ratios) if ratio >= min_p}
    assert survivors(processors.keep_min_p(torch.tensor([logits]), torch.tensor([min_p]))) == expected


@pytest.mark.parametrize("vocab_size", [1000, 50_257])
def test_truncations_leave_the_logits_of_survivors_unchanged(vocab_size: int) -> None:
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0)) * 4
    for processed in (
        processors.keep_top_k(logits, torch.tensor([1, 20, 2000]), 2000),
        processors.keep_top_p(logits, torch.tensor([0.1, 0.9, 0.9999])),
        processors.keep_min_p(logits, torch.tensor([1.0, 0.1, 0.001])),
    ):
        assert torch.equal(processed[processed.isfinite()], logits[processed.isfinite()])
        assert processed.isfinite().any(-1).all()


def test_top_p_of_nearly_one_keeps_all_of_a_flat_vocabulary() -> None:
    processed = processors.keep_top_p(torch.zeros(2, 100_000), torch.tensor([1 - 2.0**-24, 0.5]))
    assert processed.isfinite().sum(-1).tolist() == pytest.approx([100_000, 50_000], abs=2)
    assert processed[1, :49_990].isfinite().all()


def test_tokens_that_were_impossible_before_truncation_stay_so() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    assert survivors(processors.keep_top_k(logits, torch.tensor([3]), 3)) == {0, 2}
    assert survivors(processors.keep_top_p(logits, torch.tensor([0.999999]))) == {0, 2}
    assert survivors(processors.keep_min_p(logits, torch.tensor([1e-6]))) == {0, 2}


@given(st.lists(st.integers(0, 3), min_size=10, max_size=10), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.1, 10))
def test_penalties_follow_their_equations(counts: list[int], presence: float, frequency: float, penalty: float) -> None:
    logits = np.linspace(-3, 3, 10)
    table = torch.tensor([counts], dtype=torch.float32)
    row = torch.tensor(logits[None], dtype=torch.float32)
    output = processors.penalize_output(row, table, torch.tensor([presence]), torch.tensor([frequency]))
    repetition = processors.penalize_repetition(row, table, torch.tensor([penalty]))

    expected = [logit - n * frequency - (n > 0) * presence for logit, n in zip(logits, counts, strict=True)]
    assert output[0].tolist() == pytest.approx(expected, abs=1e-3)
    expected = [
        logit if n == 0 else logit / penalty if logit > 0 else logit * penalty
        for logit, n in zip(logits, counts, strict=True)
    ]
    assert repetition[0].tolist() == pytest.approx(expected, abs=1e-3)


def test_bias_and_suppression_touch_only_the_named_pairs() -> None:
    logits = torch.arange(12.0).reshape(3, 4)
    positions, token_ids = torch.tensor([0, 2, 2]), torch.tensor([1, 0, 3])
    biased = processors.add_bias(logits, positions, token_ids, torch.tensor([100.0, -100.0, 0.5]))
    suppressed = processors.suppress(logits, positions, token_ids)
    assert biased.tolist() == [[0, 101, 2, 3], [4, 5, 6, 7], [-92, 9, 10, 11.5]]
    assert suppressed.tolist() == [[0, -math.inf, 2, 3], [4, 5, 6, 7], [-math.inf, 9, 10, -math.inf]]


@given(LOGITS, st.floats(0.01, 100))
def test_temperature_scales_differences_of_logits(logits: list[float], temperature: float) -> None:
    processed = processors.apply_temperature(torch.tensor([logits]), torch.tensor([temperature]))
    expected = [(logit - max(logits)) / temperature for logit in logits]
    assert processed[0].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_smallest_temperature_gives_no_nan() -> None:
    processed = processors.apply_temperature(torch.tensor([[3.0, -torch.inf, 2.0]]), torch.tensor([1e-45]))
    assert processed[0, 0] == 0
    assert not processed.isnan().any()


def test_processors_agree_with_transformers() -> None:
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(3)) * 3
    text = torch.randint(0, 500, (4, 60), generator=torch.Generator().manual_seed(4))
    counts = torch.zeros(4, 500).scatter_add_(1, text, torch.ones(4, 60))
    pairs = [
        (logits_process.TopKLogitsWarper(17), processors.keep_top_k(logits, torch.full((4,), 17), 17)),
        (logits_process.TopPLogitsWarper(0.8), processors.keep_top_p(logits, torch.full((4,), 0.8))),
        (logits_process.MinPLogitsWarper(0.05), processors.keep_min_p(logits, torch.full((4,), 0.05))),
        (
            logits_process.RepetitionPenaltyLogitsProcessor(1.3),
            processors.penalize_repetition(logits, counts, torch.full((4,), 1.3)),
        ),
    ]
    for theirs, ours in pairs:
        assert torch.equal(theirs(text, logits.clone()), ours)


def test_a_row_is_processed_alike_alone_and_in_a_batch() -> None:
    logits = torch.randn(6, 50_257, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.1, 6, 6)[:, None]
    top_k, share = torch.tensor([1, 5, 50, 500, 5000, 50_257]), torch.linspace(0.05, 0.999, 6)
    together = (
        processors.keep_top_k(logits, top_k, 50_257),
        processors.keep_top_p(logits, share),
        processors.keep_min_p(logits, share),
        processors.apply_temperature(logits, share),
    )
    for row in range(6):
        one = slice(row, row + 1)
        alone = (
            processors.keep_top_k(logits[one], top_k[one], int(top_k[row])),
            processors.keep_top_p(logits[one], share[one]),
            processors.keep_min_p(logits[one], share[one]),
            processors.apply_temperature(logits[one], share[one]),
        )
        assert all(torch.equal(single[0], batch[row]) for single, batch in zip(alone, together, strict=True))
