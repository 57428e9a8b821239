"""What CudaBackend makes of a model: on a CPU, with the kernels in Triton's interpreter and graphs that run again."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cllm_core.backends.cuda import backend
from cllm_core.backends.cuda.attention import KernelAttention
from cllm_core.backends.cuda.backend import CudaBackend
from cllm_core.backends.cuda.graphed_model import GraphedModel
from cllm_core.backends.cuda.static_steps import Buckets, Work
from cllm_core.backends.paged_model import PagedModel
from cllm_core.models.attention import PAGED_ATTENTION, register_paged_attention
from cllm_core.models.paged import RowSpan
from tests.backends.factories import plain
from tests.checkpoints import VOCAB_SIZE, build_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the device then: tests/gpu")

BUCKETS = Buckets.of(max_rows=2, max_tokens=32)
BLOCKS = (3, 1, 4)


def replay_as_it_is(work: Work) -> Work:
    work()
    return work


@pytest.fixture
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that passes for a CUDA device."""
    monkeypatch.setattr(backend, "attention_gap", lambda *_: None)
    monkeypatch.setattr(backend, "layer_kernels_gap", lambda *_: None)
    monkeypatch.setattr(KernelAttention, "on", lambda device: KernelAttention(4))
    monkeypatch.setattr(backend, "GraphCapture", lambda device: replay_as_it_is)


def model_in(dtype: torch.dtype) -> PreTrainedModel:
    register_paged_attention()
    model = build_model("llama")
    model.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    model.set_attn_implementation(PAGED_ATTENTION)
    return model.requires_grad_(False)


def run(model: PagedModel) -> Tensor:
    """Logits of a prompt of 20 tokens, and of two windows of 5 behind it, the second in the place of the first."""
    model.allocate_cache(num_blocks=6, block_size=16)
    model.enable_graphs(max_model_len=48)
    ids = torch.randint(VOCAB_SIZE, (25,), generator=torch.Generator().manual_seed(1))
    out = []
    for start, end in ((0, 20), (20, 25), (20, 25)):
        index = torch.arange(start, end)
        rows = [RowSpan(0, end - start, start, BLOCKS)]
        out.append(model.forward(ids[index], index, rows, torch.arange(end - start)).clone())
    return torch.cat(out)


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 0.05)])
def test_a_prepared_model_computes_what_the_plain_one_does(dtype: torch.dtype, tolerance: float) -> None:
    expected = run(plain(model_in(torch.float32)))
    model = CudaBackend(BUCKETS).prepare(model_in(dtype))
    found = run(model)
    assert isinstance(model, GraphedModel)
    assert model.num_graphs == 2  # of the prompt's shape and of the windows'
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.usefixtures("_interpreted")
def test_its_paths_name_kernels_fused_layers_and_graphs() -> None:
    paths = CudaBackend(BUCKETS).prepare(model_in(torch.float16)).paths
    assert str(paths) == (
        "backend: cuda; attention: Triton kernels; layers: torch and Triton kernels, 2 of 2 fused; "
        "output layer: torch; quantization: none; graphs: steps of up to 32 tokens, captured when first met"
    )


@pytest.mark.usefixtures("_interpreted")
def test_without_graphs_steps_have_their_own_sizes() -> None:
    model = CudaBackend(None).prepare(model_in(torch.float32))
    run(model)
    assert (model.num_graphs, model.max_graph_tokens) == (0, 0)


@pytest.mark.usefixtures("_interpreted")
def test_kernels_that_cannot_run_are_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("attention_gap", "layer_kernels_gap"):
        monkeypatch.setattr(backend, name, lambda *_: "no compiler")
    model = CudaBackend(BUCKETS).prepare(model_in(torch.float16))
    assert (model.paths.attention.reason, model.paths.layers.reason) == ("no compiler", "no compiler")
    assert model.paths.graphs.reason == "graphs take the kernels' attention: no compiler"
    assert len(caplog.messages) == 2
    assert all("no compiler" in message for message in caplog.messages)
    run(model)
    assert model.num_graphs == 0


@pytest.mark.usefixtures("_interpreted")
def test_quantization_is_not_for_cuda() -> None:
    paths = CudaBackend(BUCKETS, quantizes=True).prepare(model_in(torch.float32)).paths
    assert paths.quantization.reason == "quantization is for CPUs, the model is on a CUDA device"
