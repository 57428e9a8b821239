"""Where a worker listens: checks of endpoint strings and the socket options that both sides set alike.

The worker binds and the client connects, so that a worker started by hand and one started by the server look the
same, and either side may come first or come back. The channel is neither encrypted nor authenticated: whoever
reaches the endpoint can use the model and stop the worker. Keep it on loopback, on a private network, or on ipc.
"""

import zmq

from cllm_core.errors import ConfigError

HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 4000

_LOCAL_HOSTS = ("127.", "localhost", "[::1]")


def check_endpoint(endpoint: str) -> str:
    """The endpoint itself; ConfigError unless it is `tcp://HOST:PORT` or `ipc://PATH` of a length the system takes."""
    scheme, separator, address = endpoint.partition("://")
    if not separator or scheme not in ("tcp", "ipc") or not address:
        raise ConfigError(f"endpoint={endpoint!r}: give tcp://HOST:PORT or ipc://PATH")
    if scheme == "tcp" and not address.rpartition(":")[2].isdigit():
        raise ConfigError(f"endpoint={endpoint!r}: has no port; give tcp://HOST:PORT")
    if scheme == "ipc" and len(address.encode()) > zmq.IPC_PATH_MAX_LEN:
        raise ConfigError(f"endpoint={endpoint!r}: the path exceeds {zmq.IPC_PATH_MAX_LEN} bytes; shorten it (TMPDIR)")
    return endpoint


def is_exposed(endpoint: str) -> bool:
    """Whether other machines may reach a worker that binds this endpoint."""
    scheme, _, address = endpoint.partition("://")
    return scheme == "tcp" and not address.startswith(_LOCAL_HOSTS)


def socket_options(endpoint: str) -> dict[zmq.SocketOption, int]:
    """Options for either end.

    Nothing is dropped or blocked at a high-water mark. What is under way to a client is bounded by the max_tokens of
    its requests. While it has none, nothing bounds it, but it is sent one report a second (Outbox): some hundred bytes,
    and one for each row of the steps.
    A closed ipc socket is noticed by itself; over TCP the peer's host may vanish, so libzmq's own threads exchange
    heartbeats there. They do so while Python is busy with a long step or with loading.
    """
    options = {zmq.SocketOption.SNDHWM: 0, zmq.SocketOption.RCVHWM: 0}
    if endpoint.startswith("tcp://"):
        options[zmq.SocketOption.HEARTBEAT_IVL] = HEARTBEAT_MS
        options[zmq.SocketOption.HEARTBEAT_TIMEOUT] = HEARTBEAT_TIMEOUT_MS
        options[zmq.SocketOption.IPV6] = int("[" in endpoint)
    return options
