"""Which backend takes a model on which machine, and that it says why."""

import logging

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.backends import choose
from cllm_core.backends.choose import choose_backend, kernels_take_bfloat16, prepare_model
from cllm_core.backends.cpu import coverage
from cllm_core.backends.cpu.backend import CpuBackend
from cllm_core.backends.cpu.library import load_kernels
from cllm_core.backends.cuda.backend import CudaBackend
from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.torch_plain import TorchBackend
from cllm_core.config import EngineConfig
from cllm_core.errors import ConfigError
from cllm_core.info import ComputePath
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.embedded import cache_folder
from cllm_core.models.paged import RowSpan
from tests.checkpoints import build_model

CONFIG = EngineConfig()


def model_in(dtype: torch.dtype) -> PreTrainedModel:
    register_paged_attention()
    model = build_model("llama")
    model.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    model.set_attn_implementation(PAGED_ATTENTION)
    return model.requires_grad_(False)


def logits(model: PagedModel) -> Tensor:
    """Of a text of 12 tokens."""
    model.allocate_cache(num_blocks=2, block_size=8)
    index = torch.arange(12)
    return model.forward(index, index, [RowSpan(0, 12, 0, (1, 0))], index)


@pytest.fixture
def _bfloat16_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 products for this processor")


def test_float32_on_a_cpu_stays_comparable_with_transformers() -> None:
    model = model_in(torch.float32)
    assert isinstance(choose_backend(CONFIG, model), TorchBackend)
    paths = prepare_model(CONFIG, model).paths
    assert (paths.backend.name, paths.layers.name) == ("torch", "transformers")
    assert paths.backend.reason == paths.attention.reason == "float32 is computed as transformers does"
    assert (paths.quantization.reason, paths.graphs.reason) == (None, None)


def test_a_cuda_device_gets_graphs_unless_they_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in(torch.float32)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    for config in (CONFIG, EngineConfig(cuda_graphs=False)):
        backend = choose_backend(config, model)
        assert isinstance(backend, CudaBackend)
        assert (backend._buckets is None) == (not config.cuda_graphs)


@pytest.mark.usefixtures("_bfloat16_cpu")
def test_a_bfloat16_model_without_kernels_is_computed_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    for config, reason in (
        (CONFIG, coverage.NO_KERNELS),
        (EngineConfig(native_kernels=False), "native_kernels is off"),
    ):
        monkeypatch.setattr(choose, "load_kernels", lambda folder, isa: None)
        model = model_in(torch.bfloat16)
        assert isinstance(choose_backend(config, model), CpuBackend)
        paths = prepare_model(config, model).paths
        assert paths.layers.name == "oneDNN, 2 of 2 fused"
        assert {path.reason for path in (paths.attention, paths.layers, paths.output_layer)} == {reason}


@pytest.fixture
def _no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bfloat16 instructions, for which oneDNN has no products either."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(choose, "has_bfloat16", lambda device: False)


@pytest.fixture
def _kernels() -> None:
    if load_kernels(cache_folder()) is None:
        pytest.skip("there is no C compiler here")


@pytest.mark.usefixtures("_no_bfloat16")
def test_a_processor_without_bfloat16_and_kernels_says_so() -> None:
    config = EngineConfig(native_kernels=False)
    assert not kernels_take_bfloat16(config)
    paths = prepare_model(config, model_in(torch.bfloat16)).paths
    assert str(paths.backend) == "torch (oneDNN has no bfloat16 products for this processor)"


@pytest.mark.usefixtures("_no_bfloat16", "_kernels")
def test_kernels_compute_bfloat16_on_a_processor_without_it() -> None:
    assert kernels_take_bfloat16(CONFIG)
    model = prepare_model(CONFIG, model_in(torch.bfloat16))
    assert (model.dtype, model.paths.layers) == (torch.bfloat16, ComputePath("C kernels, all in one call"))


@pytest.mark.usefixtures("_no_bfloat16", "_kernels")
def test_what_the_kernels_leave_is_computed_in_float32_there() -> None:
    widened, causal_lm = model_in(torch.bfloat16).float(), model_in(torch.bfloat16)
    banks = AdapterBank(widened), AdapterBank(causal_lm)
    expected = logits(prepare_model(CONFIG, widened, banks[0]))
    model = prepare_model(EngineConfig(cache_block_size=8), causal_lm, banks[1])
    assert "cache blocks of 8 tokens" in str(model.paths.backend.reason)
    assert (model.dtype, model.paths.layers.name) == (torch.float32, "transformers")
    assert torch.equal(logits(model), expected)
    assert banks[1].max_bytes(1) == banks[0].max_bytes(1) > 0


@pytest.mark.usefixtures("_no_bfloat16", "_kernels")
def test_bfloat16_that_was_asked_for_stays() -> None:
    config = EngineConfig(cache_block_size=8, dtype="bfloat16")
    model = prepare_model(config, model_in(torch.bfloat16))
    assert (model.dtype, model.paths.attention.name) == (torch.bfloat16, "torch, gathering the cache")
    exact = logits(prepare_model(CONFIG, model_in(torch.float32)))
    assert float((logits(model) - exact).norm() / exact.norm()) < 0.05


@pytest.mark.usefixtures("_bfloat16_cpu", "_kernels")
def test_attention_that_the_kernels_do_not_cover_is_gathered_and_named() -> None:
    model = prepare_model(EngineConfig(cache_block_size=8), model_in(torch.bfloat16))
    assert model.paths.attention.name == "torch, gathering the cache"
    assert "cache blocks of 8 tokens" in str(model.paths.attention.reason)
    assert logits(model).isfinite().all()


def test_the_paths_of_all_parts_are_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=choose.__name__):
        paths = prepare_model(CONFIG, model_in(torch.float32)).paths
    assert caplog.messages == [f"LlamaForCausalLM: {paths}"]
    reason = "float32 is computed as transformers does"
    assert str(paths) == (
        f"backend: torch ({reason}); attention: torch, gathering the cache ({reason}); "
        f"layers: transformers ({reason}); output layer: transformers ({reason}); quantization: none; graphs: none"
    )


def test_quantization_is_refused_with_the_reason_of_the_path() -> None:
    config = EngineConfig(quantization="int8")
    refused = "quantization='int8': float32 is computed as transformers does; leave out quantization"
    with pytest.raises(ConfigError) as raised:
        prepare_model(config, model_in(torch.float32))
    assert str(raised.value) == refused
