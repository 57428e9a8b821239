"""Losses against cases computed by hand."""

import math

import pytest
import torch

from cllm_core.training.losses import distribution_losses, row_losses, token_losses

# softmax of ln(p) is p
HALF_QUARTERS = torch.tensor([0.5, 0.25, 0.25]).log()
THIRDS = torch.zeros(3)


def test_token_loss_is_minus_log_probability() -> None:
    losses = token_losses(torch.stack([HALF_QUARTERS, HALF_QUARTERS]), torch.tensor([0, 2]))
    assert losses.tolist() == pytest.approx([math.log(2), math.log(4)])


def test_distribution_loss_is_the_forward_divergence() -> None:
    """KL(p || q) = sum p ln(p / q), p = (1/2, 1/4, 1/4), q = 1/3 each: -1.5 ln 2 + ln 3."""
    loss = distribution_losses(THIRDS[None], HALF_QUARTERS[None])
    assert loss.item() == pytest.approx(math.log(3) - 1.5 * math.log(2))


def test_distribution_loss_vanishes_with_its_gradient_where_both_agree() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True)
    loss = distribution_losses(logits, logits.detach() + 7.0, temperature=2.0).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-6


def test_temperature_divides_logits_and_multiplies_by_its_square() -> None:
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    warm = distribution_losses(student, teacher, temperature=2.0)
    assert warm.item() == pytest.approx(4 * distribution_losses(student / 2, teacher / 2).item())


def test_no_gradient_reaches_the_teacher_row() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses = row_losses(logits, torch.tensor([1, 2, 3]), torch.tensor([-1, -1, 1]), soft=True)
    losses[2].backward()
    assert logits.grad is not None
    assert logits.grad[:2].abs().max().item() == 0.0
    assert logits.grad[2].abs().max().item() > 0.0


def test_clean_rows_learn_tokens_and_draft_rows_distributions() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    targets, teachers = torch.tensor([1, 2, 3, 4]), torch.tensor([-1, -1, 1, 0])
    losses = row_losses(logits, targets, teachers, soft=True, temperature=1.5)
    assert torch.equal(losses[:2], token_losses(logits[:2], targets[:2]))
    assert torch.equal(losses[2:], distribution_losses(logits[2:], logits[[1, 0]], temperature=1.5))


def test_hard_targets_ignore_the_teacher_rows() -> None:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 2])
    losses = row_losses(logits, targets, torch.tensor([-1, 0]), soft=False)
    assert torch.equal(losses, token_losses(logits, targets))


def test_base_logits_are_the_target_of_clean_and_draft_rows() -> None:
    """Rows: clean 0, draft of the second clean token, clean 1, draft of the first."""
    generator = torch.Generator().manual_seed(0)
    logits, base = torch.randn(4, 5, generator=generator), torch.randn(2, 5, generator=generator)
    teachers = torch.tensor([-1, 2, -1, 0])
    losses = row_losses(logits, torch.zeros(4, dtype=torch.int64), teachers, soft=True, base_logits=base)
    assert torch.equal(losses, distribution_losses(logits, base[[0, 1, 1, 0]]))


def test_losses_of_half_precision_logits_are_computed_in_float32() -> None:
    logits = torch.tensor([[300.0, 0.0]], dtype=torch.bfloat16)
    assert token_losses(logits, torch.tensor([1])).item() == pytest.approx(300.0)
    assert distribution_losses(logits, logits).dtype == torch.float32
