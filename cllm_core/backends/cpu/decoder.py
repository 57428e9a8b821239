"""NativeDecoder: all fused layers of a model by one call of the C kernels.

To call one small operation after the other costs more than many of them do; here the threads work from the first layer
to the last without coming back. A token's numbers do not depend on what else is in the step, in bfloat16 too.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from cllm_core.backends.cpu.adapters import LayerProducts, NativeAdapters
from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.backends.cpu.layer_ops import PanelGate, PanelProduct
from cllm_core.backends.cpu.records import LayerRecord, StepRecord
from cllm_core.backends.cpu.step import NativeStep
from cllm_core.backends.fused_layer import FusedLayer


class NativeDecoder(nn.Module):
    """Stands in for all decoder layers.

    Args:
        layers: in their order, alike, with weights in panels.
        kernels: the compiled library.
    """

    def __init__(self, layers: Sequence[FusedLayer], kernels: Kernels) -> None:
        super().__init__()
        self._layers = nn.ModuleList(layers)  # whose memory the records name
        self._kernels = kernels
        self._indices = [layer.call.layer for layer in layers]
        products = [_products(layer) for layer in layers]
        self._adapters = NativeAdapters(products)
        self._records = (LayerRecord * len(layers))(
            *(_record(layer, own) for layer, own in zip(layers, products, strict=True))
        )

    def serial_torch(self) -> AbstractContextManager[None]:
        """Kernels.serial_torch."""
        return self._kernels.serial_torch()

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], paged: NativeStep, **_: object
    ) -> Tensor:
        """[1, T, H] to the same, as a stack of FusedLayers; `paged` writes the cache of all layers."""
        residual = hidden_states[0].float()
        cos, sin = (factors.contiguous() for factors in position_embeddings)
        tables, (keys, values) = paged.tables, paged.cache_addresses(self._indices)
        step = StepRecord(
            rows=tables.rows_address,
            block_ids=tables.block_ids_address,
            slots=tables.slots_address,
            keys=keys.ctypes.data,
            values=values.ctypes.data,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            num_rows=tables.num_rows,
            num_tokens=len(residual),
            block_size=paged.block_size,
        )
        self._kernels.decode(self._records, step, residual, self._adapters.share(len(residual)))
        return residual.to(hidden_states.dtype)[None]


def replace_decoder_layers(model: nn.Module, kernels: Kernels) -> bool:
    """Put one NativeDecoder in the place of a model's fused layers where it covers all of them; whether it does."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ModuleList):
            layers = [layer for layer in module if isinstance(layer, FusedLayer)]
            if layers and len(layers) == len(module) and all(_is_covered(layer, like=layers[0]) for layer in layers):
                model.set_submodule(name, nn.ModuleList([NativeDecoder(layers, kernels)]))
                return True
    return False


def _is_covered(layer: FusedLayer, *, like: FusedLayer) -> bool:
    """Whether the kernels compute this layer, between others like the given one."""
    products = (layer.qkv, layer.out, layer.gated, layer.down)
    return (
        all(isinstance(product, PanelProduct | PanelGate) for product in products)
        and layer.rope is like.rope
        and layer.call.heads == like.call.heads
        and not layer.call.scoring.features
        and layer.mlp_size == like.mlp_size
    )


def _products(layer: FusedLayer) -> LayerProducts:
    assert isinstance(layer.qkv, PanelProduct)
    assert isinstance(layer.out, PanelProduct)
    assert isinstance(layer.gated, PanelGate)
    assert isinstance(layer.down, PanelProduct)
    return LayerProducts(layer.qkv, layer.out, layer.gated, layer.down)


def _record(layer: FusedLayer, products: LayerProducts) -> LayerRecord:
    query_norm, key_norm = layer.query_norm, layer.key_norm
    return LayerRecord(
        qkv=products.qkv.weight.record,
        out=products.out.weight.record,
        gate_up=products.gate_up.weight.record,
        down=products.down.weight.record,
        input_norm=layer.input_norm.weight.data_ptr(),
        mlp_norm=layer.mlp_norm.weight.data_ptr(),
        query_norm=None if query_norm is None else query_norm.weight.data_ptr(),
        key_norm=None if key_norm is None else key_norm.weight.data_ptr(),
        num_heads=layer.call.heads.num_heads,
        num_kv_heads=layer.call.heads.num_kv_heads,
        size=layer.call.heads.size,
        window=layer.call.scoring.window or 0,
        input_epsilon=layer.input_norm.epsilon,
        mlp_epsilon=layer.mlp_norm.epsilon,
        query_epsilon=0.0 if query_norm is None else query_norm.epsilon,
        key_epsilon=0.0 if key_norm is None else key_norm.epsilon,
        scale=layer.call.scoring.scale,
    )
