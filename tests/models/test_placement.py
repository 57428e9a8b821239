"""dtype "auto" keeps the checkpoint's precision where the device computes in it, and never loses range."""

import pytest
import torch

from cllm_core.config import DTypeName
from cllm_core.models import placement
from cllm_core.models.placement import choose_device, choose_dtype

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("stored", "device", "native_bfloat16", "chosen"),
    [
        (torch.float32, CPU, True, torch.float32),
        (torch.bfloat16, CPU, True, torch.bfloat16),
        (torch.bfloat16, CPU, False, torch.float32),
        (torch.float16, CPU, True, torch.bfloat16),
        (torch.float16, CPU, False, torch.float32),
        (None, CPU, True, torch.bfloat16),
        (None, CPU, False, torch.float32),
        (torch.float64, CPU, True, torch.float32),
        (torch.float16, CUDA, True, torch.float16),
        (torch.bfloat16, CUDA, True, torch.bfloat16),
        (torch.bfloat16, CUDA, False, torch.float32),
        (torch.float32, CUDA, True, torch.float32),
    ],
)
def test_auto_dtype_follows_checkpoint_and_device(
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype | None,
    device: torch.device,
    native_bfloat16: bool,
    chosen: torch.dtype,
) -> None:
    monkeypatch.setattr(placement, "has_bfloat16", lambda device: native_bfloat16)
    assert choose_dtype("auto", stored, device) is chosen


@pytest.mark.parametrize(
    ("stored", "chosen"),
    [(torch.bfloat16, torch.bfloat16), (None, torch.bfloat16), (torch.float16, torch.float32), (torch.float32,) * 2],
)
def test_kernels_take_bfloat16_where_the_device_does_not(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype | None, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(placement, "has_bfloat16", lambda device: False)
    assert choose_dtype("auto", stored, CPU, kernels_take_bfloat16=True) is chosen


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_named_dtype_is_taken_as_it_is(name: DTypeName) -> None:
    assert choose_dtype(name, torch.bfloat16, CPU) is getattr(torch, name)


def test_changed_dtype_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(placement, "has_bfloat16", lambda device: False)
    with caplog.at_level("INFO"):
        choose_dtype("auto", torch.float16, CPU)
    assert "torch.float16 are computed in torch.float32 on cpu" in caplog.text


def test_auto_device_is_the_cpu_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
