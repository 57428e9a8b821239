from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor

from cllm_core.backends.cpu.decoder import NativeDecoder, replace_decoder_layers
from cllm_core.backends.cpu.head import replace_output_layer
from cllm_core.backends.cpu.int8 import quantise_weights
from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.backends.cpu.layer_ops import KernelOps, KernelRope
from cllm_core.backends.cpu.onednn import OneDnnOps
from cllm_core.backends.cpu.step import NativeAttention
from cllm_core.backends.cpu.weights import PANEL, PanelWeight
from cllm_core.backends.cpu.whole_model import prove_native_model
from cllm_core.backends.fused_layer import FusedLayer
from cllm_core.backends.fusing import fuse_layers
from cllm_core.backends.paged_model import PagedModel
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.lora import LowRank
from cllm_core.models.paged import RowSpan
from cllm_core.models.probe import probe_layers
from tests.architectures import Architecture
from tests.backends.factories import PATHS
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE, build_model

NUM_TOKENS = 90
BLOCK_SIZE = 16
BLOCKS = (3, 9, 1, 4, 12, 6, 15, 2)

BANKS: WeakKeyDictionary[PagedModel, AdapterBank] = WeakKeyDictionary()
"""The adapters of the models that were made."""


def make_model(
    architecture: Architecture, kernels: Kernels, *, decoder: bool = True, int8: bool = False, whole_model: bool = False
) -> PagedModel:
    """With adapter 1 loaded; `whole_model` leaves transformers out where that is proved to change nothing."""
    register_paged_attention()
    model = build_model(architecture)
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    model.set_attn_implementation(PAGED_ATTENTION)
    layers, attention = probe_layers(model.requires_grad_(False)), NativeAttention(kernels)
    bank = AdapterBank(model)
    fuse_layers(model, KernelOps(kernels, OneDnnOps(bank), bank))
    replace_output_layer(model, kernels)
    assert not int8 or quantise_weights(model)
    assert not decoder or replace_decoder_layers(model, kernels)
    forward_pass = prove_native_model(model, attention, layers) if whole_model else None
    assert (forward_pass is not None) == whole_model
    bank.attach(model)
    paged = PagedModel(model, layers, attention, PATHS, forward_pass=forward_pass, adapters=bank)
    bank.load(1, make_weights(bank))
    BANKS[paged] = bank
    paged.allocate_cache(num_blocks=24, block_size=BLOCK_SIZE)
    return paged


def make_weights(bank: AdapterBank, *, seed: int = 3) -> dict[str, LowRank]:
    """An adapter of rank 2 on every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            0.3 * torch.randn(2, shape.num_in, generator=generator),
            0.3 * torch.randn(shape.num_out, 2, generator=generator),
        )
        for name, shape in bank.linears.items()
    }


def token_ids() -> Tensor:
    return torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))


def run(paged: PagedModel, *steps: list[RowSpan]) -> Tensor:
    """Logits of all tokens of these steps; every text is the same one."""
    ids, out = token_ids(), []
    for rows in steps:
        positions = torch.cat([torch.arange(row.first_position, row.context_length) for row in rows])
        out.append(paged.forward(ids[positions], positions, rows, torch.arange(len(positions))))
    return torch.cat(out)


def whole(adapter_id: int = 0) -> list[RowSpan]:
    return [RowSpan(0, NUM_TOKENS, 0, BLOCKS, adapter_id)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_layers_at_once_are_as_near_to_float32_as_one_by_one(kernels: Kernels, architecture: Architecture) -> None:
    exact_model = build_model(architecture).requires_grad_(False)
    exact = exact_model(input_ids=token_ids()[None]).logits[0]
    one_by_one = run(make_model(architecture, kernels, decoder=False), whole())
    at_once = run(make_model(architecture, kernels), whole())
    assert (at_once - exact).norm() < 1.2 * (one_by_one - exact).norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("num_threads", "int8"), [(1, False), (3, False), (3, True)])
def test_a_token_has_the_same_logits_however_it_is_batched(
    kernels: Kernels, architecture: Architecture, num_threads: int, int8: bool
) -> None:
    """Bit for bit in bfloat16 and in 8 bits: as a prompt, in chunks, one by one, and beside another row."""
    expected = run(make_model(architecture, kernels, int8=int8), whole())
    torch.set_num_threads(num_threads)
    chunks = run(
        make_model(architecture, kernels, int8=int8),
        [RowSpan(0, 17, 0, BLOCKS)],
        [RowSpan(0, 50, 17, BLOCKS)],
        *([RowSpan(0, 1, position, BLOCKS)] for position in range(67, 72)),
        [RowSpan(0, 18, 72, BLOCKS)],
    )
    beside = run(
        make_model(architecture, kernels, int8=int8), [RowSpan(0, 5, 0, (20,)), RowSpan(5, NUM_TOKENS, 0, BLOCKS)]
    )
    torch.set_num_threads(1)
    assert torch.equal(chunks, expected)
    assert torch.equal(beside[5:], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_with_adapters_get_their_share(kernels: Kernels, architecture: Architecture) -> None:
    one_by_one = run(make_model(architecture, kernels, decoder=False), whole(adapter_id=1))
    found = run(make_model(architecture, kernels), whole(adapter_id=1))
    plain = run(make_model(architecture, kernels), whole())
    assert (found - one_by_one).norm() < 0.1 * (found - plain).norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("num_threads", "int8"), [(1, False), (3, False), (3, True)])
def test_a_token_has_the_same_logits_whatever_adapters_others_have(
    kernels: Kernels, architecture: Architecture, num_threads: int, int8: bool
) -> None:
    """Bit for bit, without an adapter beside one and with one beside none: adapters cannot change others' texts."""
    paged = make_model(architecture, kernels, int8=int8)
    plain, adapted = run(paged, whole()), run(paged, whole(1))
    torch.set_num_threads(num_threads)
    beside = run(paged, [RowSpan(0, 5, 0, (20,), 1), RowSpan(5, NUM_TOKENS, 0, BLOCKS)])
    other = run(paged, [RowSpan(0, 5, 0, (20,)), RowSpan(5, NUM_TOKENS, 0, BLOCKS, 1)])
    chunks = run(
        paged, *([RowSpan(0, end - start, start, BLOCKS, 1)] for start, end in ((0, 17), (17, 20), (20, NUM_TOKENS)))
    )
    torch.set_num_threads(1)
    assert torch.equal(beside[5:], plain)
    assert torch.equal(other[5:], adapted)
    assert torch.equal(chunks, adapted)
    assert not torch.allclose(plain, adapted, atol=0.1)


def test_an_id_that_comes_to_name_another_adapter_gets_its_share(kernels: Kernels) -> None:
    paged = make_model("llama", kernels)
    bank = BANKS[paged]
    first = run(paged, whole(1))
    bank.drop(1)
    bank.load(1, make_weights(bank, seed=5))
    second = run(paged, whole(1))
    assert not torch.allclose(first, second, atol=0.1)
    bank.drop(1)
    bank.load(1, make_weights(bank))
    assert torch.equal(run(paged, whole(1)), first)


def test_an_adapter_of_some_layers_and_of_gates_alone_adds_there(kernels: Kernels) -> None:
    paged = make_model("llama", kernels)
    bank = BANKS[paged]
    own = {name: w for name, w in make_weights(bank).items() if "1.mlp.gate" in name or "0.self_attn.k" in name}
    bank.load(2, own)
    by_torch = make_model("llama", kernels, decoder=False)
    BANKS[by_torch].load(2, own)
    found, plain = run(paged, whole(2)), run(paged, whole())
    assert (found - run(by_torch, whole(2))).norm() < 0.2 * (found - plain).norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_transformers_around_the_layers_all_logits_stay(kernels: Kernels, architecture: Architecture) -> None:
    expected = run(make_model(architecture, kernels), whole()), run(make_model(architecture, kernels), whole(1))
    paged = make_model(architecture, kernels, whole_model=True)
    paged.causal_lm.forward = None  # type: ignore[assignment]  # nobody calls it any more
    assert torch.equal(run(paged, whole()), expected[0])
    assert torch.equal(run(paged, whole(1)), expected[1])


def test_a_model_that_scales_its_logits_is_called_as_a_whole(kernels: Kernels) -> None:
    paged = make_model("llama", kernels)
    forward = paged.causal_lm.forward

    def scaled(**inputs: object) -> object:
        out = forward(**inputs)
        out.logits = 2 * out.logits
        return out

    paged.causal_lm.forward = scaled
    assert prove_native_model(paged.causal_lm, NativeAttention(kernels), paged.layers) is None


def test_layers_with_ropes_of_their_own_stay_apart(kernels: Kernels) -> None:
    paged = make_model("llama", kernels, decoder=False)
    model = paged.causal_lm
    first = model.get_submodule("model.layers.0")
    assert isinstance(first, FusedLayer)
    first.rope = KernelRope(kernels)
    assert not replace_decoder_layers(model, kernels)
    assert not any(isinstance(module, NativeDecoder) for module in model.modules())


@pytest.mark.parametrize("shape", [(1, 2, PANEL), (3, 64, 2 * PANEL), (13, 70, PANEL), (500, 96, 3 * PANEL)])
def test_products_are_those_of_torch(kernels: Kernels, shape: tuple[int, int, int], tmp_path: Path) -> None:
    num_tokens, num_in, num_out = shape
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((num_tokens, num_in), (num_out, num_in), (num_out,)))
    weights = PanelWeight.of(weight, bias)
    assert (weights.num_in, weights.num_out) == (num_in, num_out)
    out = kernels.linear(x, weights)
    torch.testing.assert_close(out.float(), x.float() @ weight.float().T + bias.float(), rtol=2**-8, atol=1e-4)
    assert torch.equal(out[:1], kernels.linear(x[:1], weights))
