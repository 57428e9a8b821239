"""The output layer of a bfloat16 model with logits in float32.

Rounded to bfloat16, logits around 20 stand an eighth apart: the two likeliest tokens often tie, and the lower id wins.
Where embeddings are tied to the output layer, they are read from its panels: the weight exists once.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_core.backends.cpu.coverage import output_layer_gap
from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.backends.cpu.weights import PanelWeight, pad_outputs


class NativeHead(nn.Module):
    """Stands in for the output layer.

    Args:
        weight: [V, H], V rounded up.
        vocab_size: V.
        kernels: the compiled library.
    """

    def __init__(self, weight: PanelWeight, vocab_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.weight, self._vocab_size, self._kernels = weight, vocab_size, kernels

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] bfloat16 -> [..., V] float32."""
        logits = self._kernels.logits(hidden.flatten(0, -2), self.weight)[:, : self._vocab_size]
        return logits.view(*hidden.shape[:-1], self._vocab_size)


class NativeEmbedding(nn.Module):
    """Stands in for the embedding that is tied to a NativeHead.

    Args:
        head: whose weight it reads.
    """

    def __init__(self, head: NativeHead) -> None:
        super().__init__()
        self._head = head

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] int64 -> [..., H] bfloat16."""
        return self._head.weight.rows(token_ids)


def replace_output_layer(model: PreTrainedModel, kernels: Kernels) -> str | None:
    """Put a NativeHead in the place of the model's output layer where the kernels cover it; else the reason."""
    gap = output_layer_gap(model)
    if gap is not None:
        return gap
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    native = NativeHead(PanelWeight.of(pad_outputs(head.weight.detach())), len(head.weight), kernels)
    model.set_output_embeddings(native)
    if type(embedding) is nn.Embedding and embedding.weight is head.weight:
        model.set_input_embeddings(NativeEmbedding(native))
    return None
