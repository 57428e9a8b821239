"""What the tests on a CUDA device share."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA device: leave out -m gpu on machines without one")
    assert os.environ.get("TRITON_INTERPRET") != "1", "the kernels would run in Triton's interpreter: unset it"
    return torch.device("cuda", torch.cuda.current_device())
