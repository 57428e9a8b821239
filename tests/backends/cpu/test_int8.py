"""Weights of 8 bits: the format, the kernels against whole-number arithmetic, and which models take them."""

import pytest
import torch
from torch import Tensor

from cllm_core.backends.cpu.int8 import quantise_weights
from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.backends.cpu.weights import INT8_GROUP, PANEL, PanelWeight
from cllm_core.backends.fused_layer import FusedLayer
from tests.backends.cpu.test_native_decoder import make_model, run, whole


def make_weight(num_out: int, num_in: int) -> Tensor:
    """Weights with outliers, and one group of an output that is all zeros."""
    weight = torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(num_in)).bfloat16()
    weight[1, 3] = 90
    weight[2, :INT8_GROUP] = 0
    return weight


def product_in_whole_numbers(x: Tensor, weight: PanelWeight) -> Tensor:
    """[T, in] and [out, in] of 8 bits to [T, out] float32: each group's sum exact, then added in order."""
    groups = x.float().unflatten(1, (-1, INT8_GROUP))
    peaks = groups.abs().amax(dim=-1, keepdim=True)
    inputs = (groups * torch.where(peaks > 0, torch.full_like(peaks, 127) / peaks, 0)).round()
    numbers = (
        weight.panels[..., : PANEL * INT8_GROUP]
        .view(torch.int8)
        .view(*weight.panels.shape[:2], INT8_GROUP // 4, PANEL, 4)
    )
    numbers = numbers.permute(0, 3, 1, 2, 4).reshape(weight.num_out, -1, INT8_GROUP).double()
    scales = weight.panels[..., PANEL * INT8_GROUP :].view(torch.bfloat16).transpose(1, 2).reshape(weight.num_out, -1)
    out = torch.zeros(len(x), weight.num_out)
    for group in range(groups.shape[1]):
        sums = inputs[:, group].double() @ numbers[:, group].T
        factors = scales[:, group].float() * (peaks[:, group] / 127)
        out = (out.double() + sums * factors.double()).float()  # one rounding, as the processor's a * b + c has
    return out


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, INT8_GROUP, PANEL), (13, 3 * INT8_GROUP, 2 * PANEL), (500, 128, 3 * PANEL)])
def test_products_are_those_of_whole_numbers(kernels: Kernels, shape: tuple[int, int, int], num_threads: int) -> None:
    num_tokens, num_in, num_out = shape
    x, weight = torch.randn(num_tokens, num_in).bfloat16(), PanelWeight.of(make_weight(num_out, num_in)).to_int8()
    x[0, :INT8_GROUP] = 0
    torch.set_num_threads(num_threads)
    logits, outputs = kernels.logits(x, weight), kernels.linear(x, weight)
    torch.set_num_threads(1)
    assert torch.equal(logits, product_in_whole_numbers(x, weight))
    assert torch.equal(outputs, logits.bfloat16())


def test_a_product_is_the_same_in_any_batch(kernels: Kernels) -> None:
    x, weight = torch.randn(37, 128).bfloat16(), PanelWeight.of(make_weight(2 * PANEL, 128)).to_int8()
    together = kernels.logits(x, weight)
    assert torch.equal(together, torch.cat([kernels.logits(row[None], weight) for row in x]))


def test_a_weight_moves_by_half_a_step_at_most() -> None:
    """A step is the largest weight of the group over 127, and the scale itself is rounded to bfloat16."""
    weight, bias = make_weight(4 * PANEL, 3 * INT8_GROUP), torch.randn(4 * PANEL).bfloat16()
    rounded = PanelWeight.of(weight, bias).to_int8()
    assert (rounded.num_in, rounded.num_out) == (3 * INT8_GROUP, 4 * PANEL)
    assert rounded.num_bytes == weight.numel() + 2 * weight.numel() // INT8_GROUP
    assert rounded.bias is not None
    assert torch.equal(rounded.bias, bias.float())
    restored = rounded.rows(torch.arange(4 * PANEL)).float()
    largest = weight.float().unflatten(1, (-1, INT8_GROUP)).abs().amax(dim=-1).repeat_interleave(INT8_GROUP, dim=1)
    tolerance = largest * (0.5 / 127 + 2 * 2**-8)  # the scale's rounding, and that of the restored weight
    assert ((restored - weight.float()).abs() <= tolerance).all()
    assert (restored - weight.float()).norm() < 0.01 * weight.float().norm()


def test_rows_are_the_weights_of_outputs() -> None:
    weight = make_weight(2 * PANEL, INT8_GROUP)
    index = torch.tensor([[3, 40], [63, 0]])
    assert torch.equal(PanelWeight.of(weight).rows(index), weight[index])


@pytest.mark.parametrize("adapter_id", [0, 1])
def test_a_rounded_model_is_near_the_plain_one(kernels: Kernels, adapter_id: int) -> None:
    """With the share of an adapter too, which stays bfloat16."""
    plain = run(make_model("llama", kernels), whole(adapter_id))
    rounded = run(make_model("llama", kernels, int8=True), whole(adapter_id))
    assert not torch.equal(rounded, plain)
    assert (rounded - plain).norm() < 0.1 * plain.norm()


def test_only_whole_models_by_the_kernels_are_rounded(kernels: Kernels) -> None:
    paged = make_model("llama", kernels, decoder=False)
    model = paged.causal_lm
    layer = next(module for module in model.modules() if isinstance(module, FusedLayer))
    before = layer.qkv
    layer.down = None  # type: ignore[assignment]  # whatever is not by the kernels
    assert quantise_weights(model) == 0
    assert layer.qkv is before
