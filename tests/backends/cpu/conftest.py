import pytest

from cllm_core.backends.cpu.kernels import Kernels, load_kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Kernels that compute whole decoders."""
    loaded = load_kernels(tmp_path_factory.mktemp("kernels"))
    if loaded is None or not loaded.can_decode:
        pytest.skip("no C compiler, or no processor with AVX512-BF16 and without AMX")
    return loaded
