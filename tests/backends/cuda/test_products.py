"""Products of fused layers on a CUDA device, which run on any."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cllm_core.backends.cuda.layer_kernels import CudaOps, LayerKernels
from cllm_core.backends.layer_ops import LayerOps, TorchProduct


def linears(*, bias: bool) -> tuple[list[nn.Linear], Tensor]:
    """Two layers of 8 inputs, and some inputs."""
    torch.manual_seed(0)
    return [nn.Linear(8, 6, bias=bias), nn.Linear(8, 6, bias=bias)], torch.randn(5, 8)


def named(layers: list[nn.Linear]) -> dict[str, nn.Linear]:
    return {str(index): layer for index, layer in enumerate(layers)}


@torch.inference_mode()
def test_layers_side_by_side_give_what_each_gives_alone() -> None:
    for bias in (True, False):
        layers, x = linears(bias=bias)
        product = LayerOps().product(named(layers))
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        other = torch.randn(5, 12)
        torch.testing.assert_close(product(x), expected)
        torch.testing.assert_close(product.plus(x, other.clone()), expected + other)


@torch.inference_mode()
def test_a_sum_is_written_where_its_other_part_was() -> None:
    """Without a bias; a kernel of its own for the sum costs a step of few tokens as much as a norm."""
    layers, x = linears(bias=False)
    other = torch.randn(5, 12)
    assert LayerOps().product(named(layers)).plus(x, other) is other


def test_the_weight_of_one_layer_is_not_copied() -> None:
    (layer, _), _ = linears(bias=True)
    product = LayerOps().product({"": layer})
    assert isinstance(product, TorchProduct)
    assert product.weight.data_ptr() == layer.weight.data_ptr()


@torch.inference_mode()
def test_a_gate_is_the_silu_of_one_layer_times_the_other(kernel_device: torch.device) -> None:
    (gate, up), x = linears(bias=False)
    gate, up, x = gate.to(kernel_device), up.to(kernel_device), x.to(kernel_device)
    for ops in (LayerOps(), CudaOps(None), CudaOps(LayerKernels())):
        gated = ops.gated_product({"gate": gate}, {"up": up})
        torch.testing.assert_close(gated(x), F.silu(gate(x)) * up(x))
