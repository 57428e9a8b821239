"""Kernels run on the device where there is one, else in Triton's interpreter on the CPU (tests/conftest.py)."""

import pytest
import torch


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
