"""NativeModel: a model whose layers are one NativeDecoder, without what transformers does around them in every step.

It took 0.3 ms of the 4.8 that one token of a model of 135M parameters took (docs/performance.md).
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_core.backends.cpu.decoder import NativeDecoder
from cllm_core.backends.cpu.step import NativeStep

_PARTS = ["embed_tokens", "layers", "norm", "rotary_emb"]


class NativeModel:
    """Calls the parts of a model one after the other; the caller proves that nothing else happens between them.

    Args:
        body: with an embedding, rotary embeddings, layers and a last norm.
        decoder: the layers.
        head: the output layer.
    """

    def __init__(self, body: nn.Module, decoder: NativeDecoder, head: nn.Module) -> None:
        self._embedding, self._norm = body.get_submodule("embed_tokens"), body.get_submodule("norm")
        self._rotation = body.get_submodule("rotary_emb")
        self._decoder, self._head = decoder, head

    @classmethod
    def of(cls, model: PreTrainedModel) -> "NativeModel | None":
        """None where the model has other parts, or layers that no NativeDecoder computes."""
        body, head = model.get_decoder(), model.get_output_embeddings()
        parts = dict(body.named_children())
        if sorted(parts) != _PARTS or not isinstance(head, nn.Module):
            return None
        match list(parts["layers"].children()):
            case [NativeDecoder() as decoder]:
                return cls(body, decoder, head)
        return None

    def logits(self, input_ids: Tensor, positions: Tensor, sampled: Tensor, step: NativeStep) -> Tensor:
        """[S, V] of the tokens at the indices `sampled` [S] of input_ids [T]; all int64."""
        hidden = self._embedding(input_ids[None])
        factors = self._rotation(hidden, positions[None])
        hidden = self._decoder(hidden, position_embeddings=factors, paged=step)
        logits: Tensor = self._head(self._norm(hidden[0, sampled]))
        return logits
