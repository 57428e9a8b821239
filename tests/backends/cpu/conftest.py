"""The kernels for every instruction set that this processor has."""

import pytest

from cllm_core.backends.cpu.compilation import machine_isas
from cllm_core.backends.cpu.kernels import Kernels
from cllm_core.backends.cpu.library import KernelLibrary, load_library
from cllm_core.models.embedded import cache_folder


@pytest.fixture(scope="session")
def library() -> KernelLibrary:
    loaded = load_library(cache_folder())
    if loaded is None:
        pytest.skip("there are no C kernels for this processor, or no C compiler")
    return loaded


@pytest.fixture(scope="session", params=machine_isas())
def kernels(library: KernelLibrary, request: pytest.FixtureRequest) -> Kernels:
    if request.param not in library.isas:
        pytest.skip(f"this processor has no {request.param}")
    return library.kernels(request.param)
