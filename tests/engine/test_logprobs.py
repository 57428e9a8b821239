"""Log-probabilities against a float64 reference."""

import numpy as np
import pytest
import torch

from cllm_core.engine.logprobs import compute_logprobs


def test_logprobs_equal_a_float64_log_softmax() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 10
    chosen = torch.tensor([0, 299, 7, 7, 100])
    expected = logits.double().numpy() - np.logaddexp.reduce(logits.double().numpy(), axis=-1, keepdims=True)
    order = np.argsort(-expected, axis=-1)[:, :4]

    chosen_logprob, top_ids, top_logprobs = compute_logprobs(logits, chosen, 4)

    assert chosen_logprob.numpy() == pytest.approx(expected[np.arange(5), chosen], abs=1e-4)
    assert top_ids.tolist() == order.tolist()
    assert top_logprobs.numpy() == pytest.approx(np.take_along_axis(expected, order, -1), abs=1e-4)


def test_the_chosen_token_is_the_best_one_where_greedy() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    chosen_logprob, top_ids, top_logprobs = compute_logprobs(logits, logits.argmax(-1), 1)
    assert torch.equal(chosen_logprob, top_logprobs[:, 0])
    assert torch.equal(logits.argmax(-1), top_ids[:, 0])


@pytest.mark.parametrize("num_top", [0, 20])
def test_shapes_and_types_hold_for_half_precision_and_for_no_alternatives(num_top: int) -> None:
    logits = torch.randn(3, 20).bfloat16()
    chosen_logprob, top_ids, top_logprobs = compute_logprobs(logits, torch.tensor([1, 2, 3]), num_top)
    assert (chosen_logprob.shape, top_ids.shape, top_logprobs.shape) == ((3,), (3, num_top), (3, num_top))
    assert chosen_logprob.dtype == top_logprobs.dtype == torch.float32
    assert (chosen_logprob <= 0).all()


def test_a_row_has_the_same_logprobs_alone_and_in_a_batch() -> None:
    logits = torch.randn(7, 50_257, generator=torch.Generator().manual_seed(2))
    chosen = torch.arange(7)
    together = compute_logprobs(logits, chosen, 5)
    for row in range(7):
        alone = compute_logprobs(logits[row : row + 1], chosen[row : row + 1], 5)
        assert all(torch.equal(one[0], all_rows[row]) for one, all_rows in zip(alone, together, strict=True))
