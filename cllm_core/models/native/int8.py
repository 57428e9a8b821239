"""Holds the weights of a model's matrix products in 8 bits: half the memory to read, which is what a step of few tokens
waits for. The kernels round inputs to 8 bits too, so that products are of whole numbers.
"""

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from cllm_core.models.fused_layer import FusedLayer
from cllm_core.models.native.head import NativeHead
from cllm_core.models.native.products import PanelGate, PanelProduct
from cllm_core.models.native.weights import INT8_GROUP, PanelWeight

_PRODUCTS = ("qkv", "out", "gated", "down")


def quantise_weights(model: PreTrainedModel) -> int:
    """Round all weights in panels, those of the output layer and embeddings tied to it included.

    Returns:
        Bytes saved. 0, and nothing is changed, where the output layer or a product of a fused layer is not by our own
        kernels, or not of whole groups of inputs.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    head = model.get_output_embeddings()
    if not isinstance(head, NativeHead) or not all(_is_covered(layer) for layer in layers) or not _fits(head.weight):
        return 0
    num_saved = 0
    for layer in layers:
        for name in _PRODUCTS:
            product = getattr(layer, name)
            rounded = replace(product, weight=product.weight.to_int8())
            num_saved += product.weight.num_bytes - rounded.weight.num_bytes
            setattr(layer, name, rounded)
    before = head.weight.num_bytes
    head.weight = head.weight.to_int8()
    return num_saved + before - head.weight.num_bytes


def _is_covered(layer: nn.Module) -> bool:
    products = [getattr(layer, name) for name in _PRODUCTS]
    return all(isinstance(product, PanelProduct | PanelGate) and _fits(product.weight) for product in products)


def _fits(weight: PanelWeight) -> bool:
    return weight.num_in % INT8_GROUP == 0
