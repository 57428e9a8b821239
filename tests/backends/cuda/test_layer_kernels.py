"""The kernels between a layer's products against torch, bit for bit where they promise it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cllm_core.backends.cuda.layer_kernels import LayerKernels, layer_kernels_gap, trial_error
from cllm_core.backends.layer_ops import TorchRope
from cllm_core.backends.step_tables import CacheSlots

NUM_PADDING = 3


@dataclass(frozen=True)
class Case:
    """Heads of tokens; the last NUM_PADDING of them share a slot."""

    num_heads: int
    num_kv_heads: int
    size: int
    num_tokens: int = 9
    has_head_norms: bool = False  # queries and keys lie apart from the values then


CASES = [
    Case(2, 1, 16),
    Case(4, 4, 64, num_tokens=NUM_PADDING + 1),
    Case(6, 2, 24),
    Case(5, 1, 10),
    Case(9, 3, 64, has_head_norms=True),
    pytest.param(Case(32, 32, 128, num_tokens=512), marks=pytest.mark.gpu),
    pytest.param(Case(28, 4, 128, num_tokens=2048), marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Step:
    """What the kernel is given; the cache holds random numbers before."""

    heads: tuple[Tensor, Tensor, Tensor]
    factors: tuple[Tensor, Tensor]
    cache: CacheSlots

    @classmethod
    def draw(cls, case: Case, dtype: torch.dtype, device: torch.device) -> "Step":
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        sizes = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
        query, key, value = draw(case.num_tokens, sum(sizes), case.size).split(sizes, dim=1)
        if case.has_head_norms:
            query, key = query.contiguous(), key.contiguous()
        num_slots = 2 * case.num_tokens
        slots = torch.randperm(num_slots - 1, generator=generator)[: case.num_tokens].int()
        slots[-NUM_PADDING:] = num_slots - 1
        cache = draw(2, num_slots, case.num_kv_heads, case.size)
        factors = draw(2, 1, case.num_tokens, case.size)  # no halves alike, which plain rotation allows
        return cls((query, key, value), (factors[0], factors[1]), CacheSlots(cache[0], cache[1], slots.to(device)))

    def rotated_plainly(self) -> tuple[Tensor, CacheSlots]:
        """Queries, and copies of the caches as they shall be."""
        query, key, value = self.heads
        rotated = TorchRope()(torch.cat((query, key), dim=1), *self.factors)
        slots = self.cache.slots.long()
        keys = self.cache.keys.index_copy(0, slots, rotated[:, query.shape[1] :])
        values = self.cache.values.index_copy(0, slots, value)
        return rotated[:, : query.shape[1]], CacheSlots(keys, values, self.cache.slots)


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """By how much a rotated number may differ from torch's, in absolute terms."""
    if dtype == torch.float32:
        return 2**-17  # one of the two may round a product and a sum at once; numbers are below 64
    # The interpreter cuts off what does not fit into bfloat16, instead of rounding it, twice; numbers are below 16.
    return 2 * 2**-4 if dtype == torch.bfloat16 and device.type == "cpu" else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_rope_and_stores_are_those_of_torch(case: Case, dtype: torch.dtype, kernel_device: torch.device) -> None:
    step = Step.draw(case, dtype, kernel_device)
    query, expected = step.rotated_plainly()
    found = LayerKernels().rope_and_store_kv(*step.heads, factors=step.factors, slots=step.cache)
    allowed = rounding(dtype, kernel_device)
    torch.testing.assert_close(found, query, atol=allowed, rtol=0)
    # All but the last slot, which several tokens share: what none of the step owns stays as it was.
    torch.testing.assert_close(step.cache.keys[:-1], expected.keys[:-1], atol=allowed, rtol=0)
    assert torch.equal(step.cache.values[:-1], expected.values[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 1024, 1500, pytest.param(11008, marks=pytest.mark.gpu)])
def test_the_gate_is_the_silu_of_one_half_times_the_other(
    size: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    both = (8 * torch.randn(5, 2 * size, generator=torch.Generator().manual_seed(0))).to(kernel_device, dtype)
    both[0, 0] = -1e4  # whose exponential is infinite
    gate, up = both.chunk(2, dim=-1)
    with np.errstate(over="ignore"):  # of the interpreter
        found = LayerKernels().gate(both)
    # The last places of exponentials differ, which makes a unit after rounding; the interpreter's bfloat16, see above.
    torch.testing.assert_close(found, F.silu(gate) * up, atol=5e-6, rtol=max(1e-5, 2 * torch.finfo(dtype).eps))


def test_kernels_that_cannot_be_compiled_are_not_used(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    def without_compiler(*_: object, **__: object) -> Tensor:
        raise FileNotFoundError("gcc")

    kernels = LayerKernels()
    assert trial_error(kernels, torch.bfloat16, kernel_device) is None
    monkeypatch.setattr(kernels, "gate", without_compiler)
    assert trial_error(kernels, torch.bfloat16, kernel_device) == "the kernels cannot be used: gcc"


def test_kernels_are_for_cuda_only() -> None:
    assert layer_kernels_gap(torch.bfloat16, torch.device("cpu")) == "the kernels are for CUDA, the model is on cpu"
