"""Which backend takes a model on which machine, and that it says why."""

import logging

import pytest
import torch
from transformers import PreTrainedModel

from cllm_core.backends import choose
from cllm_core.backends.choose import choose_backend, prepare_model
from cllm_core.backends.cpu import coverage
from cllm_core.backends.cpu.backend import CpuBackend
from cllm_core.backends.cpu.library import load_kernels
from cllm_core.backends.cuda.backend import CudaBackend
from cllm_core.backends.torch_plain import TorchBackend
from cllm_core.config import EngineConfig
from cllm_core.errors import ConfigError
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


def test_a_processor_without_bfloat16_products_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    paths = prepare_model(CONFIG, model_in(torch.bfloat16)).paths
    assert str(paths.backend) == "torch (oneDNN has no bfloat16 products for this processor)"


@pytest.mark.usefixtures("_bfloat16_cpu")
def test_attention_that_the_kernels_do_not_cover_is_gathered_and_named() -> None:
    if load_kernels(cache_folder()) is None:
        pytest.skip("there is no C compiler here")
    model = prepare_model(EngineConfig(cache_block_size=8), model_in(torch.bfloat16))
    assert model.paths.attention.name == "torch, gathering the cache"
    assert "cache blocks of 8 tokens" in str(model.paths.attention.reason)
    model.allocate_cache(num_blocks=2, block_size=8)
    index = torch.arange(12)
    assert model.forward(index, index, [RowSpan(0, 12, 0, (1, 0))], index).isfinite().all()


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
