"""NativeModel: a model whose layers are one NativeDecoder, without what transformers does around them in every step.

It took 0.3 ms of the 4.8 that one token of a model of 135M parameters took (docs/log/performance.md).
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_core.backends.cpu.decoder import NativeDecoder
from cllm_core.backends.cpu.kernels import LANES
from cllm_core.backends.cpu.step import NativeAttention
from cllm_core.models.attention import PagedAttention
from cllm_core.models.forward import TransformersForward
from cllm_core.models.paged import KVCache, LayerSpec, RowSpan

logger = logging.getLogger(__name__)

_PARTS = ["embed_tokens", "layers", "norm", "rotary_emb"]
_NUM_PROBE_TOKENS = 12


class NativeModel:
    """Calls the parts of a model one after the other (ForwardPass); `prove_native_model` that nothing is between them.

    Args:
        body: with an embedding, rotary embeddings, layers and a last norm.
        decoder: the layers.
        head: the output layer.
    """

    def __init__(self, body: nn.Module, decoder: NativeDecoder, head: nn.Module) -> None:
        self._embedding, self._norm = body.get_submodule("embed_tokens"), body.get_submodule("norm")
        self._rotary = body.get_submodule("rotary_emb")
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

    def __call__(self, input_ids: Tensor, positions: Tensor, sampled: Tensor, step: PagedAttention) -> Tensor:
        """See ForwardPass; the step is a NativeStep."""
        with self._decoder.serial_torch():
            return self._forward(input_ids, positions, sampled, step)

    def _forward(self, input_ids: Tensor, positions: Tensor, sampled: Tensor, step: PagedAttention) -> Tensor:
        hidden = self._embedding(input_ids[None])
        factors = self._rotary(hidden, positions[None])
        hidden = self._decoder(hidden, position_embeddings=factors, paged=step)
        logits: Tensor = self._head(self._norm(hidden[0, sampled]))
        return logits


def prove_native_model(
    model: PreTrainedModel, attention: NativeAttention, layers: Sequence[LayerSpec]
) -> NativeModel | None:
    """The model without transformers between its parts, where that changes no logit of a few tokens; else None.

    Args:
        model: with a NativeDecoder in place where it has one.
        attention: covers its layers.
        layers: what each stores.
    """
    native = NativeModel.of(model)
    if native is None:
        return None
    cache = KVCache(layers, num_blocks=1, block_size=LANES, dtype=model.dtype, device=model.device)
    step = attention.begin(cache, [RowSpan(0, _NUM_PROBE_TOKENS, 0, (0,))])
    index = torch.arange(_NUM_PROBE_TOKENS)
    with torch.inference_mode():
        expected = TransformersForward(model)(index, index, index, step)
        if not torch.equal(native(index, index, index, step), expected):
            logger.info("%s does more than call its parts: it is called as a whole", type(model).__name__)
            return None
    return native
