"""What the C kernels cover. Each function gives the reason why they do not compute a part, None where they do; whatever
they leave, torch and oneDNN compute. New features of attention belong into `attention_gap` until a kernel has them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from cllm_core.backends.cpu.kernels import HEAD_SIZE_UNIT, LANES, MAX_HEAD_SIZE
from cllm_core.backends.cpu.weights import INT8_GROUP, PANEL, PanelWeight
from cllm_core.models.attention import ALIBI
from cllm_core.models.paged import LayerSpec

NO_KERNELS = "there are no C kernels for this processor, see the log"


def attention_gap(layers: Sequence[LayerSpec], dtype: torch.dtype, *, block_size: int) -> str | None:
    """Of attention over a cache of this block size, on the CPU."""
    if dtype != torch.bfloat16:
        return f"the C kernels attend in bfloat16, the model is in {_name(dtype)}"
    if block_size % LANES:
        return f"cache blocks of {block_size} tokens: the C kernels take multiples of {LANES}"
    for spec in layers:
        if ALIBI in spec.features:
            return f"the C kernels have no {ALIBI}"
        size = spec.key_size
        if spec.value_size != size or size > MAX_HEAD_SIZE or size % HEAD_SIZE_UNIT:
            return (
                f"heads of {size} and {spec.value_size}: the C kernels take keys and values of one size, a multiple of "
                f"{HEAD_SIZE_UNIT} up to {MAX_HEAD_SIZE}"
            )
    return None


def product_gap(linears: Iterable[nn.Linear]) -> str | None:
    """Of the product of these linear layers, alone and side by side."""
    for linear in linears:
        if linear.weight.dtype != torch.bfloat16:
            return f"the C kernels multiply bfloat16, the model is in {_name(linear.weight.dtype)}"
        if linear.in_features % 2 or linear.out_features % PANEL:
            return (
                f"a product of {linear.in_features} by {linear.out_features}: the C kernels take an even number of "
                f"inputs and multiples of {PANEL} outputs"
            )
    return None


def output_layer_gap(model: PreTrainedModel) -> str | None:
    """Of a model's output layer."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "bias" in dict(head.named_parameters()):
        return "the output layer is no linear layer without bias"
    if head.weight.dtype != torch.bfloat16 or head.in_features % 2:
        return "the C kernels take an output layer in bfloat16 with an even number of inputs"
    return None


def int8_gap(weights: Iterable[PanelWeight]) -> str | None:
    """Of rounding weights to 8 bits."""
    for weight in weights:
        if weight.num_in % INT8_GROUP:
            return f"a product of {weight.num_in} inputs: int8 takes multiples of {INT8_GROUP}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
