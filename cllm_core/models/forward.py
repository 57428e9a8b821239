"""One step of a model by calling it as transformers does."""

import inspect

from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.models.attention import PagedAttention, step_attention


class TransformersForward:
    """Calls the model for a step's tokens.

    Args:
        model: loaded with attn_implementation="cllm_paged".
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # Some classes take what they do not know without a word, and compute the logits of every token.
        self._selects = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    def __call__(self, input_ids: Tensor, positions: Tensor, sampled: Tensor, step: PagedAttention) -> Tensor:
        """[T], [T] and [S] int64 to the logits [S, V] of the tokens at the indices `sampled`."""
        selection = {"logits_to_keep": sampled} if self._selects else {}
        with step_attention(step):
            out = self._model(
                input_ids=input_ids[None], position_ids=positions[None], use_cache=False, paged=step, **selection
            )
        logits: Tensor = out.logits[0]
        return logits if self._selects else logits[sampled]
