"""The weights in panels that a model has by now: in its fused layers and its output layer."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from cllm_core.backends.cpu.head import NativeHead
from cllm_core.backends.cpu.layer_ops import PanelGate, PanelProduct
from cllm_core.backends.cpu.weights import PanelWeight
from cllm_core.backends.fused_layer import FusedLayer

_PRODUCTS = ("qkv", "out", "gated", "down")


def panel_weights(model: PreTrainedModel) -> Iterator[PanelWeight]:
    """All of them."""
    for layer in _layers(model):
        yield from (product.weight for _, product in _panel_products(layer))
    head = model.get_output_embeddings()
    if isinstance(head, NativeHead):
        yield head.weight


def replace_weights(model: PreTrainedModel, change: Callable[[PanelWeight], PanelWeight]) -> None:
    """Put in the place of each what `change` makes of it."""
    for layer in _layers(model):
        for name, product in list(_panel_products(layer)):
            setattr(layer, name, replace(product, weight=change(product.weight)))
    head = model.get_output_embeddings()
    if isinstance(head, NativeHead):
        head.weight = change(head.weight)


def has_only_panels(model: PreTrainedModel) -> bool:
    """Whether the output layer and every product of every fused layer read panels."""
    products = [len(list(_panel_products(layer))) for layer in _layers(model)]
    return isinstance(model.get_output_embeddings(), NativeHead) and all(num == len(_PRODUCTS) for num in products)


def _layers(model: nn.Module) -> list[FusedLayer]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


def _panel_products(layer: FusedLayer) -> Iterator[tuple[str, PanelProduct | PanelGate]]:
    for name in _PRODUCTS:
        product = getattr(layer, name)
        if isinstance(product, PanelProduct | PanelGate):
            yield name, product
