import pytest

from cllm_core.errors import ConfigError
from cllm_core.worker.messages import Loading
from cllm_core.worker.transport import WorkerSocket, check_endpoint, is_exposed


@pytest.mark.parametrize(
    "endpoint", ["", "localhost:1", "udp://127.0.0.1:1", "tcp://", "tcp://host", "ipc://" + 200 * "x"]
)
def test_a_malformed_endpoint_is_refused_by_name(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint="):
        check_endpoint(endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5557", "tcp://[::1]:5557", "tcp://worker:5557", "ipc:///tmp/w"])
def test_a_good_endpoint_is_taken_as_it_is(endpoint: str) -> None:
    assert check_endpoint(endpoint) == endpoint


def test_only_endpoints_beyond_this_machine_are_exposed() -> None:
    assert not any(is_exposed(e) for e in ("tcp://127.0.0.1:1", "tcp://localhost:1", "tcp://[::1]:1", "ipc:///tmp/w"))
    assert all(is_exposed(e) for e in ("tcp://0.0.0.0:1", "tcp://*:1", "tcp://10.0.0.1:1"))


def test_an_endpoint_in_use_is_refused_with_a_remedy(tcp_endpoint: str) -> None:
    with WorkerSocket(tcp_endpoint, Loading("", 0)), pytest.raises(ConfigError, match="give a free port"):
        WorkerSocket(tcp_endpoint, Loading("", 0))
