"""The output layer of a bfloat16 model with logits in float32.

Rounded to bfloat16, logits around 20 stand an eighth apart: the two likeliest tokens often tie, and the lower id wins.
The plain weight is used, which is the embedding's where the two are tied: no packed copy is kept.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_core.models.native.kernels import VOCAB_UNIT, WIDTH_UNIT, Kernels


class NativeHead(nn.Module):
    """Stands in for the output layer.

    Args:
        weight: [V, H] bfloat16, contiguous, on the CPU, of sizes that the kernels take; shared, not copied.
        kernels: the compiled library.
    """

    def __init__(self, weight: nn.Parameter, kernels: Kernels) -> None:
        super().__init__()
        self.weight = weight
        self._kernels = kernels

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] bfloat16 -> [..., V] float32."""
        return self._kernels.project(hidden, self.weight)


def use_native_head(model: PreTrainedModel, kernels: Kernels) -> bool:
    """Replace the model's output layer where the kernels cover it; whether they do."""
    head = model.get_output_embeddings()
    has_bias = "bias" in dict(head.named_parameters())
    if not kernels.can_project or type(head) is not nn.Linear or has_bias or not _is_covered(head.weight):
        return False
    model.set_output_embeddings(NativeHead(head.weight, kernels))
    return True


def _is_covered(weight: Tensor) -> TypeGuard[nn.Parameter]:
    return (
        isinstance(weight, nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and weight.shape[0] % VOCAB_UNIT == 0
        and weight.shape[1] % WIDTH_UNIT == 0
    )
