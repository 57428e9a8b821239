import re
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_core.backends.cpu.onednn import OneDnnOps
from cllm_core.backends.cuda.layer_kernels import CudaOps, KernelGate, LayerKernels
from cllm_core.backends.fused_layer import FusedLayer
from cllm_core.backends.fusing import Fusion, fuse_layers
from cllm_core.backends.layer_ops import TorchProduct
from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.step_tables import AttentionByTables, TableAttention
from cllm_core.backends.torch_plain import GatheredAttention
from cllm_core.models.adapter_bank import AdaptedProduct, AdapterBank
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.lora import LowRank
from cllm_core.models.paged import RowSpan
from cllm_core.models.probe import probe_layers
from tests.architectures import Architecture
from tests.backends.factories import PATHS
from tests.backends.table_attention import attend_plainly
from tests.checkpoints import ARCHITECTURES, VOCAB_SIZE, build_model

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def make_model(architecture: Architecture, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    register_paged_attention()
    model = build_model(architecture)
    model.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    model.set_attn_implementation(PAGED_ATTENTION)
    model.requires_grad_(False)
    return model


def run_three_steps(
    model: PreTrainedModel, bank: AdapterBank | None = None, attention: TableAttention | None = None
) -> Tensor:
    """Logits of a prompt of 40 tokens and a window of 5 behind it, beside a second row, which has adapter 1."""
    layers, gathered = probe_layers(model), GatheredAttention(model.device)
    by_tables = None if attention is None else AttentionByTables(attention, model.device)
    paged = PagedModel(model, layers, by_tables or gathered, PATHS, adapters=bank)
    paged.allocate_cache(num_blocks=16, block_size=8)
    ids = torch.randint(VOCAB_SIZE, (60,), generator=torch.Generator().manual_seed(1))
    blocks = (3, 9, 1, 4, 12, 6)
    steps = [
        ([RowSpan(0, 30, 0, blocks)], torch.arange(30)),
        ([RowSpan(0, 10, 30, blocks), RowSpan(10, 3, 0, (0,), 1)], torch.tensor([*range(30, 40), 0, 1, 2])),
        ([RowSpan(0, 5, 40, blocks), RowSpan(5, 1, 3, (0,), 1)], torch.tensor([*range(40, 45), 3])),
    ]
    out = [
        paged.forward(ids[: len(positions)], positions, rows, torch.arange(len(positions))) for rows, positions in steps
    ]
    return torch.cat(out)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_layers_compute_what_transformers_does(architecture: Architecture) -> None:
    expected = run_three_steps(make_model(architecture))
    model = make_model(architecture)
    assert fuse_layers(model, OneDnnOps()) == Fusion(
        model.config.num_hidden_layers, model.config.num_hidden_layers, None
    )
    torch.testing.assert_close(run_three_steps(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the device then: tests/gpu")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])  # plain, with biases, with norms of heads
def test_layers_fused_as_on_a_device_compute_what_transformers_does(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products that overwrite the residual, and the kernels between them, in Triton's interpreter."""
    expected = run_three_steps(make_model(architecture))
    kernels, stores = LayerKernels(), []
    rope_and_store_kv = kernels.rope_and_store_kv

    def count_stores(query: Tensor, *args: Tensor, **settings: object) -> Tensor:
        stores.append(len(query))
        return rope_and_store_kv(query, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "rope_and_store_kv", count_stores)
    model = make_model(architecture)
    assert fuse_layers(model, CudaOps(kernels)).num_fused == model.config.num_hidden_layers
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    for layer in layers:
        assert isinstance(layer.down, TorchProduct)
        assert isinstance(layer.gated, KernelGate)
        assert layer.gated.kernels is layer.rope_store is kernels
    stores.clear()
    found = run_three_steps(model, attention=attend_plainly)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sorted(stores) == sorted([30, 13, 6] * len(layers))
    # Attention that gathers has no tables, so torch applies RoPE.
    torch.testing.assert_close(run_three_steps(model), expected, rtol=1e-4, atol=1e-4)
    assert len(stores) == 3 * len(layers)


def test_fused_layers_are_as_near_to_float32_as_the_layers_they_replace() -> None:
    exact = run_three_steps(make_model("llama"))
    plain = run_three_steps(make_model("llama", torch.bfloat16))
    model = make_model("llama", torch.bfloat16)
    fuse_layers(model, OneDnnOps())
    assert (run_three_steps(model) - exact).norm() < 1.5 * (plain - exact).norm()


def test_a_layer_that_computes_otherwise_is_left_alone() -> None:
    """The parts of the first layer have the common shape, but its norm is another one."""

    def centred_norm(norm: nn.Module, _: object, out: Tensor) -> Tensor:
        return out + 0.1

    model = make_model("llama")
    model.get_submodule("model.layers.0.input_layernorm").register_forward_hook(centred_norm)
    expected = run_three_steps(model)
    fusion = fuse_layers(model, OneDnnOps())
    assert fusion.num_fused == model.config.num_hidden_layers - 1
    assert fusion.gap is not None
    assert re.fullmatch(r"model.layers.0: its result would differ by \S+", fusion.gap)
    assert not isinstance(model.get_submodule("model.layers.0"), FusedLayer)
    torch.testing.assert_close(run_three_steps(model), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_of_another_shape_is_left_alone() -> None:
    model = make_model("qwen3")
    model.get_submodule("model.layers.1.mlp").act_fn = nn.GELU()
    fusion = fuse_layers(model, OneDnnOps())
    assert fusion.num_fused == model.config.num_hidden_layers - 1
    assert fusion.gap == "some decoder layers have another shape than Llama's"


class CountingBank(AdapterBank):
    """Counts, whenever a layer is fused, how many of the model's own layers are left."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.counts: list[int] = []
        self._weights = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]

    def product(self, *names: str) -> AdaptedProduct:
        if names[0].endswith("q_proj"):  # the first of a layer
            self.counts.append(sum(weight() is not None for weight in self._weights))
        return super().product(*names)


def test_a_layer_is_given_up_before_the_next_one_is_fused() -> None:
    """All plain weights stayed alive beside the fused ones until the last layer was done."""
    model = make_model("qwen2-sliding")  # of 3 layers with 7 linear layers each, and the output
    bank = CountingBank(model)
    fuse_layers(model, OneDnnOps(bank))
    assert bank.counts == [22, 15, 8]


def adapted_logits(architecture: Architecture, *, fuse: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits with an adapter on some layers, whose weights depend on nothing but their shape and order."""
    model = make_model(architecture, dtype)
    bank = AdapterBank(model)
    if fuse:
        assert fuse_layers(model, OneDnnOps(bank)).num_fused == model.config.num_hidden_layers
    bank.attach(model)
    generator = torch.Generator().manual_seed(3)
    layers = {
        name: LowRank(
            0.3 * torch.randn(2 + index % 3, shape.num_in, generator=generator),
            0.3 * torch.randn(shape.num_out, 2 + index % 3, generator=generator),
        )
        for index, (name, shape) in enumerate(bank.linears.items())
        if index % 4
    }
    bank.load(1, layers)
    return run_three_steps(model, bank)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_fused_layers_add_what_adapters_add_to_plain_ones(architecture: Architecture) -> None:
    expected = adapted_logits(architecture, fuse=False)
    assert (expected - run_three_steps(make_model(architecture))).abs().max() > 0.1
    torch.testing.assert_close(adapted_logits(architecture, fuse=True), expected, rtol=1e-4, atol=1e-4)


def test_rows_without_an_adapter_are_not_touched_by_one() -> None:
    adapted, plain = adapted_logits("llama", fuse=True), run_three_steps(make_model("llama"))
    own = [*range(40), *range(43, 48)]  # tokens of the first row in the three steps
    torch.testing.assert_close(adapted[own], plain[own], rtol=1e-4, atol=1e-4)


def test_adapted_bfloat16_layers_are_near_to_float32() -> None:
    exact = adapted_logits("llama", fuse=False)
    plain = adapted_logits("llama", fuse=False, dtype=torch.bfloat16)
    fused = adapted_logits("llama", fuse=True, dtype=torch.bfloat16)
    assert (fused - exact).norm() < 1.5 * (plain - exact).norm()
