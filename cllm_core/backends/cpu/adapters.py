"""NativeAdapters: what adapters add to the products of a NativeDecoder, as the kernels read it.

An adapter's two factors are linear layers of their own, computed by the same products for the tokens of its rows alone;
what comes of it is added to those tokens' sums before they are rounded. The other tokens' numbers are what they are
without any adapter in the step, bit for bit.
"""

from collections.abc import Sequence
from ctypes import Array, addressof
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cllm_core.backends.cpu.kernels import LANES
from cllm_core.backends.cpu.layer_ops import PanelGate, PanelProduct
from cllm_core.backends.cpu.records import AdaptedTokensRecord, AdapterLayerRecord, LinearRecord, LowRankRecord
from cllm_core.backends.cpu.weights import PANEL, PanelWeight, pad_outputs
from cllm_core.models.adapter_bank import AdaptedProduct, AdapterGroup
from cllm_core.models.lora import LowRank


@dataclass(frozen=True, slots=True)
class LayerProducts:
    """The four products of a decoder layer."""

    qkv: PanelProduct
    out: PanelProduct
    gate_up: PanelGate
    down: PanelProduct


@dataclass(frozen=True, slots=True)
class StepShare:
    """The adapters of one step, for the kernels.

    Attributes:
        groups: of each adapter, the tokens and the weights.
        places: [T] int64, where a token stands among those of all adapters, or -1.
        num_tokens: of all adapters.
        most_tokens: of any adapter.
        most_rank: of any of their products, as the kernels read it.
    """

    groups: Array[AdaptedTokensRecord]
    places: Tensor
    num_tokens: int
    most_tokens: int
    most_rank: int
    _tokens: tuple[Tensor, ...]  # whose memory the groups name


@dataclass(frozen=True, slots=True)
class _Native:
    """An adapter in the kernels' layout."""

    records: Array[AdapterLayerRecord]
    rank: int
    source: object  # the weights it was made of: an id may come to name others
    _weights: tuple[PanelWeight, ...]  # whose memory the records name


class NativeAdapters:
    """Holds adapters for the kernels; each is laid out when a step first has it.

    Args:
        layers: in their order.
    """

    def __init__(self, layers: Sequence[LayerProducts]) -> None:
        self._layers = tuple(layers)
        self._first = layers[0].qkv.adapters  # any will do to tell what a step has
        self._natives: dict[int, _Native] = {}

    def share(self, num_tokens: int) -> StepShare | None:
        """What the adapters of the current step add to its products; None where no token has an adapter."""
        if self._first is None or not self._first.is_active:
            return None
        groups = self._first.groups
        natives = [self._native(group.adapter_id) for group in groups]
        tokens = tuple(_tokens(group, num_tokens) for group in groups)
        of_all = torch.cat(tokens)
        places = torch.full((num_tokens,), -1)
        places[of_all] = torch.arange(len(of_all))
        records = (AdaptedTokensRecord * len(groups))(
            *(
                AdaptedTokensRecord(addressof(native.records), own.data_ptr(), len(own))
                for native, own in zip(natives, tokens, strict=True)
            )
        )
        most_rank = max(native.rank for native in natives)
        return StepShare(records, places, len(of_all), max(map(len, tokens)), most_rank, tokens)

    def _native(self, adapter_id: int) -> _Native:
        source = self._source(adapter_id)
        native = self._natives.get(adapter_id)
        if native is None or native.source is not source:
            self._natives = {known: one for known, one in self._natives.items() if one.source is self._source(known)}
            native = self._natives[adapter_id] = self._lay_out(adapter_id, source)
        return native

    def _source(self, adapter_id: int) -> object:
        """Something of the adapter's weights that is another object when they are others."""
        found = (product.weights(adapter_id) for layer in self._layers for product in _adapted(layer))
        return next((weights for weights in found if weights is not None), None)

    def _lay_out(self, adapter_id: int, source: object) -> _Native:
        kept: list[PanelWeight] = []
        records = (AdapterLayerRecord * len(self._layers))()
        for record, layer in zip(records, self._layers, strict=True):
            for name in ("qkv", "out", "down"):
                product: PanelProduct = getattr(layer, name)
                setattr(record, name, _record(_weights(product.adapters, adapter_id), kept))
            record.gate_up = _record(_gate_up(layer.gate_up, adapter_id), kept)
        return _Native(records, max((w.num_in for w in kept[1::2]), default=PANEL), source, tuple(kept))


def _adapted(layer: LayerProducts) -> list[AdaptedProduct]:
    products = (layer.qkv.adapters, layer.out.adapters, layer.gate_up.gate_adapters, layer.gate_up.up_adapters)
    return [product for product in (*products, layer.down.adapters) if product is not None]


def _weights(product: AdaptedProduct | None, adapter_id: int) -> LowRank | None:
    return None if product is None else product.weights(adapter_id)


def _gate_up(product: PanelGate, adapter_id: int) -> LowRank | None:
    """One pair for gate and up, whose outputs alternate in runs of LANES as those of the weight do."""
    both = [_weights(adapters, adapter_id) for adapters in (product.gate_adapters, product.up_adapters)]
    own = [weights for weights in both if weights is not None]
    if not own:
        return None
    up = torch.zeros(len(own[0].up) // LANES, 2, LANES, sum(weights.rank for weights in own), dtype=own[0].up.dtype)
    first = 0
    for part, weights in enumerate(both):
        if weights is not None:
            up[:, part, :, first : first + weights.rank] = weights.up.unflatten(0, (-1, LANES))
            first += weights.rank
    return LowRank(torch.cat([weights.down for weights in own]), up.flatten(0, 2))


def _record(weights: LowRank | None, kept: list[PanelWeight]) -> LowRankRecord:
    if weights is None:
        return LowRankRecord(LinearRecord(), LinearRecord())
    down = PanelWeight.of(pad_outputs(weights.down.bfloat16()))
    up = PanelWeight.of(F.pad(weights.up.bfloat16(), (0, down.num_out - weights.rank)))
    kept += (down, up)
    return LowRankRecord(down.record, up.record)


def _tokens(group: AdapterGroup, num_tokens: int) -> Tensor:
    return torch.arange(num_tokens) if group.token_index is None else group.token_index
