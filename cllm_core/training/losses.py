r"""The losses of a Consistency LLM, as maths on logits (arXiv:2403.00835, section 3.3). Pure functions.

With q_theta the model, x the prompt, y* the fixed point of its trajectory and y a state of it:

- global consistency   L_GC = sum_i KL( stopgrad q(. | y*_{:i}, x)  ||  q(. | y_{:i}, x) )
- local consistency    L_LC = the same with the state after y in place of y*
- AR                   L_AR = - sum_i log q( y*_i | y*_{:i}, x )
- together             L = w_c L_consistency + w_ar L_AR

*Soft* targets are the distributions above, *hard* ones their most likely tokens: the tokens of y* (or of the next
state), which turns the divergence into cross entropy. *Base* targets are distributions of another model p, the one
that q_theta has to answer like; the AR loss has them too, sum_i KL( p(. | y*_{:i}, x) || q(. | y*_{:i}, x) ).

Terms before the first wrong token of a state are those of AR and are left out, as are terms behind the end of the
answer (see `examples`): no row of logits here is masked.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def token_losses(logits: Tensor, target_ids: Tensor) -> Tensor:
    """Cross entropy to a token: -log q(target). AR loss on clean tokens, hard consistency loss on draft tokens.

    Args:
        logits: [R, V], any float dtype; computed on in float32.
        target_ids: [R] int64.

    Returns:
        [R] float32.
    """
    return functional.cross_entropy(logits.float(), target_ids, reduction="none")


def distribution_losses(logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward divergence KL(stopgrad p || q), the soft consistency loss; 0 exactly where both agree.

    Args:
        logits: [R, V] of the draft tokens.
        teacher_logits: [R, V] at the clean tokens that predict the same positions; no gradient goes there.
        temperature: both are divided by it, and the result is multiplied by its square, so that gradients keep their
            size (Hinton et al., arXiv:1503.02531).

    Returns:
        [R] float32.
    """
    student = functional.log_softmax(logits.float() / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return _divergence(teacher, student) * temperature**2


def divergence_losses(logits: Tensor, *, base_logits: Tensor, divergence: str, temperature: float = 1.0) -> Tensor:
    """How far distributions are from those of the base, or of a teacher; 0 where both agree, but for ce.

    Args:
        logits: [R, V] of the rows that learn.
        base_logits: [R, V] of the other model at the same places; no gradient goes there.
        divergence: l1, the sum of absolute differences of the probabilities, twice the share of drawn proposals that
            are refused (arXiv:2609.04010); kl or forward, as `distribution_losses`; reverse, KL(q || stopgrad p); jsd,
            the mean of both divergences to the mixture m = (p + q) / 2 (beta of 1/2 in arXiv:2306.13649, equation 1);
            ce, cross entropy to its likeliest token.
        temperature: of forward, reverse and jsd, as in `distribution_losses`; the others have none.

    Returns:
        [R] float32.
    """
    match divergence:
        case "l1":
            wanted = torch.softmax(base_logits.detach().float(), dim=-1)
            return (torch.softmax(logits.float(), dim=-1) - wanted).abs().sum(dim=-1)
        case "kl" | "forward":
            return distribution_losses(logits, base_logits, temperature=temperature)
        case "ce":
            return token_losses(logits, base_logits.argmax(dim=-1))
        case "reverse" | "jsd":
            student = functional.log_softmax(logits.float() / temperature, dim=-1)
            teacher = functional.log_softmax(base_logits.detach().float() / temperature, dim=-1)
            if divergence == "reverse":
                return _divergence(student, teacher) * temperature**2
            mixture = torch.logaddexp(student, teacher) - math.log(2)
            return (_divergence(teacher, mixture) + _divergence(student, mixture)) / 2 * temperature**2
    raise ValueError(divergence)


def _divergence(of: Tensor, to: Tensor) -> Tensor:
    """[R] KL(of || to), both [R, V] log-probabilities."""
    return functional.kl_div(to, of, reduction="none", log_target=True).sum(dim=-1)


def row_losses(
    logits: Tensor,
    target_ids: Tensor,
    teacher_rows: Tensor,
    *,
    soft: bool,
    temperature: float = 1.0,
    base_logits: Tensor | None = None,
) -> Tensor:
    """The loss of each row of a mixed list of clean and draft tokens.

    Args:
        logits: [R, V].
        target_ids: [R] int64, the token to predict.
        teacher_rows: [R] int64; for a draft token the row of the clean token that predicts the same position, -1 for a
            clean token.
        soft: whether draft tokens learn the teacher row's distribution instead of the target token.
        temperature: of the soft targets.
        base_logits: [C, V] of another model for the C clean tokens, in their order: clean and draft tokens learn its
            distributions, whatever `soft` says.

    Returns:
        [R] float32.
    """
    is_draft = teacher_rows >= 0
    if base_logits is not None:
        own_rows = torch.arange(len(logits), device=logits.device)
        clean_index = (~is_draft).cumsum(dim=0) - 1
        targets = base_logits[clean_index[torch.where(is_draft, teacher_rows, own_rows)]]
        return distribution_losses(logits, targets, temperature=temperature)
    if not soft:
        return token_losses(logits, target_ids)
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    losses[~is_draft] = token_losses(logits[~is_draft], target_ids[~is_draft])
    losses[is_draft] = distribution_losses(logits[is_draft], logits[teacher_rows[is_draft]], temperature=temperature)
    return losses
