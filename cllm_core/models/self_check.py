"""The self-check: what a model computes on the paged cache, against what transformers computes without one.

The log-probabilities after each token of two short texts must be the same, however the texts are cut into rows
(`check_rows`). What an architecture does that the cache does not know - a mask of its own, a change to its scores,
state beside keys and values - makes them differ, and so does what depends on company.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import attention_switched
from cllm_core.models.check_rows import CheckRow, CheckTexts, log_probabilities, plain_forward, run_rows
from cllm_core.models.exact import float32_arithmetic, is_quantised

NUM_TOKENS = 32
"""Of each text, at load."""

MAX_ERROR = 0.01
"""Nats, in float32: another order of additions changes about 1e-5, another computation 0.05 to 10."""

MAX_QUANTISED_ERROR = 0.5
"""Nats, where weights of less than 16 bits keep an arithmetic of their own."""

_REFERENCE = "eager"  # the one attention of transformers that knows all variants
_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Difference:
    """How far rows on the paged cache are from transformers.

    Attributes:
        nats: largest difference of two log-probabilities; not a number where one of them is not.
        row: which kind of row shows it.
        limit: what rounding explains, in nats.
    """

    nats: float
    row: str
    limit: float

    @property
    def is_rounding(self) -> bool:
        """Whether both compute the same."""
        return self.nats <= self.limit

    def __str__(self) -> str:
        return f"{self.nats:.2g} nats in {self.row}, where rounding explains {self.limit:.2g}"


def require_equal(model: PreTrainedModel, *, name: str, max_model_len: int) -> None:
    """Raise ModelLoadError unless the model computes on the paged cache what transformers computes without.

    Args:
        model: loaded with attn_implementation="cllm_paged".
        name: of the checkpoint, for the message.
        max_model_len: positions that the model has.
    """
    texts = CheckTexts.draw(model, min(NUM_TOKENS, max_model_len))
    found, _ = compare_with_transformers(model, texts)
    if not found.is_rounding:
        raise ModelLoadError(
            f"{name}: {type(model).__name__} would be served wrong: its log-probabilities are off from transformers' "
            f"own by {found}; --skip-self-check serves it all the same"
        )


@torch.inference_mode()
def compare_with_transformers(model: PreTrainedModel, texts: CheckTexts) -> tuple[Difference, Tensor]:
    """Compute the texts both ways, in float32 unless the weights are quantised.

    Args:
        model: loaded with attn_implementation="cllm_paged".
        texts: drawn for it.

    Returns:
        The difference, and transformers' log-probabilities [2, S, V] after the scored tokens.

    Raises:
        ModelLoadError: the model does not run.
    """
    is_exact = not is_quantised(model)
    dtype, limit = (torch.float32, MAX_ERROR) if is_exact else (model.dtype, MAX_QUANTISED_ERROR)
    with float32_arithmetic(model) if is_exact else nullcontext():
        expected = reference_logprobs(model, texts)
        found = _run_plain(model, texts, dtype)
    return largest_difference(found, expected, texts, limit=limit), expected


@torch.inference_mode()
def reference_logprobs(model: PreTrainedModel, texts: CheckTexts) -> Tensor:
    """[2, S, V] by transformers alone, after the scored tokens.

    Raises:
        ModelLoadError: transformers does not run the model.
    """
    try:
        with attention_switched(model, _REFERENCE):
            logits = model(input_ids=texts.token_ids, use_cache=False, logits_to_keep=texts.scored).logits
            if logits.shape[1] == texts.num_tokens:  # the class computes all of them, whatever is asked for
                logits = logits[:, texts.scored]
    except Exception as error:  # of the model's own code
        detail = " ".join(str(error).split())
        raise ModelLoadError(
            f"{type(model).__name__} cannot be checked, transformers itself does not run it: {detail}; "
            "--skip-self-check serves it unchecked"
        ) from error
    return log_probabilities(logits)


def _run_plain(model: PreTrainedModel, texts: CheckTexts, dtype: torch.dtype) -> list[tuple[CheckRow, Tensor]]:
    forward = plain_forward(model, texts, block_size=_BLOCK_SIZE, dtype=dtype)
    try:
        return list(run_rows(forward, texts, block_size=_BLOCK_SIZE))
    except ModelLoadError:
        raise
    except Exception as error:  # of the model's own code
        detail = " ".join(str(error).split())
        raise ModelLoadError(f"{type(model).__name__} does not run on the paged cache: {detail}") from error


def largest_difference(
    found: Iterable[tuple[CheckRow, Tensor]], expected: Tensor, texts: CheckTexts, *, limit: float
) -> Difference:
    """Of the rows' log-probabilities [s, V] from those of the whole texts [2, S, V]."""
    distances = [(distance(logprobs, expected[row.text, row.scored(texts)]), row.kind) for row, logprobs in found]
    nats, kind = max(distances, key=lambda pair: (pair[0] != pair[0], pair[0]))  # not a number counts as most
    return Difference(nats, kind, limit)


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference; equal infinities, of tokens that the model never chooses, are none."""
    return float(torch.where(found == expected, 0.0, (found - expected).abs()).amax())
