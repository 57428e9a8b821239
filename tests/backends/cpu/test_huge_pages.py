import mmap

import pytest
import torch

from cllm_core.backends.cpu.huge_pages import HugePages, move_to_huge_pages, padded_bytes
from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.backends.cpu.panels import panel_weights
from cllm_core.backends.cpu.weights import PanelWeight
from tests.backends.cpu.test_native_decoder import make_model, run, whole

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")


def test_tensors_are_moved_one_behind_the_other() -> None:
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.uint8), torch.randn(4, 2).bfloat16().t()]
    pages = HugePages(sum(map(padded_bytes, tensors)))
    moved = [pages.move(tensor) for tensor in tensors]
    assert all(map(torch.equal, moved, tensors))
    starts = [tensor.data_ptr() for tensor in moved]
    assert [start - starts[0] for start in starts] == [0, 64, 128]


def test_moved_tensors_outlive_what_moved_them() -> None:
    moved = HugePages(64).move(torch.arange(16.0))
    assert torch.equal(moved, torch.arange(16.0))


@pytest.mark.parametrize("int8", [False, True])
def test_a_model_computes_the_same_with_its_weights_in_huge_pages(kernels: Kernels, int8: bool) -> None:
    paged = make_model("llama", kernels, decoder=False, int8=int8)
    expected, before = run(paged, whole()), list(panel_weights(paged.causal_lm))
    move_to_huge_pages(paged.causal_lm)
    weights = list(panel_weights(paged.causal_lm))
    assert len(weights) == len(before) > 4
    assert all(map(_equal, weights, before))
    assert _span(weights) == sum(padded_bytes(weight.panels) for weight in weights)
    assert torch.equal(run(paged, whole()), expected)


def _equal(weight: PanelWeight, other: PanelWeight) -> bool:
    return torch.equal(weight.panels, other.panels) and weight.bias is other.bias


def _span(weights: list[PanelWeight]) -> int:
    """Bytes from the first weight to the end of the last, in the order of their addresses."""
    first, last = min(weights, key=_address), max(weights, key=_address)
    return _address(last) + padded_bytes(last.panels) - _address(first)


def _address(weight: PanelWeight) -> int:
    return weight.panels.data_ptr()
