"""Fixtures of all layers. torch is imported only by the fixtures that need it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architectures import Architecture

# Where drivers of CUDA devices show: gVisor has no /proc/driver, and WSL2 has /dev/dxg alone.
_CUDA_PATHS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")

# Without a CUDA device, Triton's kernels run in its interpreter. Triton reads this when transformers imports it, which
# other conftests do before any hook is called.
if not any(Path(path).exists() for path in _CUDA_PATHS):
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """Tests use no network: a library that asks the Hub fails at once instead of waiting."""
    os.environ["HF_HUB_OFFLINE"] = "1"


CheckpointFactory = Callable[[Architecture], Path]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """Folder of a tiny random checkpoint by architecture name, written once a session: do not change it."""
    import torch  # noqa: PLC0415

    from tests.checkpoints import write_checkpoint  # noqa: PLC0415

    torch.set_num_threads(1)  # tiny matrices run faster on one thread
    folders: dict[Architecture, Path] = {}

    def folder_of(architecture: Architecture) -> Path:
        if architecture not in folders:
            folders[architecture] = write_checkpoint(tmp_path_factory.mktemp(architecture), architecture)
        return folders[architecture]

    return folder_of


@pytest.fixture(scope="session")
def tiny_llama(tiny_checkpoint: CheckpointFactory) -> Path:
    """Folder of the tiny random Llama checkpoint: do not change it."""
    return tiny_checkpoint("llama")
