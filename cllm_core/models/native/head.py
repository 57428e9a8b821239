"""The output layer of a bfloat16 model with logits in float32.

Rounded to bfloat16, logits around 20 stand an eighth apart: the two likeliest tokens often tie, and the lower id wins.
Where embeddings are tied to the output layer, they are read from its panels: the weight exists once.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_core.models.native.kernels import PANEL, Kernels
from cllm_core.models.native.products import to_panels


class NativeHead(nn.Module):
    """Stands in for the output layer.

    Args:
        panels: [V / PANEL, H / 2, PANEL, 2] bfloat16, V rounded up.
        vocab_size: V.
        kernels: the compiled library.
    """

    def __init__(self, panels: Tensor, vocab_size: int, kernels: Kernels) -> None:
        super().__init__()
        self._panels, self._vocab_size, self._kernels = panels, vocab_size, kernels

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] bfloat16 -> [..., V] float32."""
        logits = self._kernels.logits(hidden.flatten(0, -2), self._panels)[:, : self._vocab_size]
        return logits.view(*hidden.shape[:-1], -1)


class NativeEmbedding(nn.Module):
    """Stands in for the embedding that is tied to a NativeHead.

    Args:
        panels: of the head.
    """

    def __init__(self, panels: Tensor) -> None:
        super().__init__()
        self._panels = panels

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] int64 -> [..., H] bfloat16."""
        return self._panels[token_ids // PANEL, :, token_ids % PANEL].flatten(-2)


def use_native_head(model: PreTrainedModel, kernels: Kernels) -> bool:
    """Replace the model's output layer where the kernels cover it; whether they do."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    has_bias = "bias" in dict(head.named_parameters())
    if not kernels.can_multiply or type(head) is not nn.Linear or has_bias or not _is_covered(head.weight):
        return False
    weight = head.weight.detach()
    panels = to_panels(F.pad(weight, (0, 0, 0, -len(weight) % PANEL)))
    model.set_output_embeddings(NativeHead(panels, len(weight), kernels))
    if type(embedding) is nn.Embedding and embedding.weight is head.weight:
        model.set_input_embeddings(NativeEmbedding(panels))
    return True


def _is_covered(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
