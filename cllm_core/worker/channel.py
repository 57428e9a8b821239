"""WorkerChannel: the worker's end of the wire. It knows which clients are there and greets new ones.

It knows nothing of the engine. The process uses it while the model loads, WorkerLoop afterwards.
"""

import errno
import logging
from collections.abc import Collection
from types import TracebackType
from typing import Protocol, Self, cast

import msgspec
import zmq

from cllm_core.errors import ConfigError
from cllm_core.worker.endpoint import check_endpoint, is_exposed, socket_options
from cllm_core.worker.messages import (
    PROTOCOL_VERSION,
    Abort,
    Failed,
    FromWorker,
    Hello,
    LoadAdapter,
    Shutdown,
    Submit,
    ToWorker,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)

ClientId = bytes
Command = Submit | Abort | LoadAdapter | UnloadAdapter | Shutdown

# How long the last messages of a leaving worker may take to reach the clients.
_LINGER_MS = 1000


class Wakeable(Protocol):
    """Something whose file descriptor becomes readable when a waiting receive() should return."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


class WorkerChannel:
    """Binds the endpoint and exchanges typed messages with any number of clients. Close it, or use it in `with`.

    Args:
        endpoint: tcp://ADDRESS:PORT or ipc://PATH to bind.
        greeting: what a client hears on its Hello, until `announce` changes it.

    Raises:
        ConfigError: the endpoint is malformed or cannot be bound.
    """

    def __init__(self, endpoint: str, greeting: FromWorker) -> None:
        self._greeting = greeting
        self._clients: set[ClientId] = set()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._poller = zmq.Poller()
        try:
            self._bind(check_endpoint(endpoint))
        except ConfigError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def clients(self) -> Collection[ClientId]:
        """Those that said Hello and were not yet found gone."""
        return frozenset(self._clients)

    def wake_on(self, source: Wakeable) -> None:
        """Let a waiting receive() also return when this becomes readable."""
        self._poller.register(source, zmq.POLLIN)

    def announce(self, greeting: FromWorker) -> None:
        """Tell all clients, and from now on every new one."""
        self._greeting = greeting
        for client in self.clients:
            self.send(client, greeting)

    def receive(self, wait_seconds: float | None) -> list[tuple[ClientId, Command]]:
        """All that has come in; waits for something up to `wait_seconds` (None: without end, 0: not at all)."""
        if wait_seconds != 0:
            self._poller.poll(None if wait_seconds is None else int(wait_seconds * 1000))
        commands = []
        # Asked between any two steps: setting a poll up takes several times as long.
        while cast(int, self._socket.get(zmq.SocketOption.EVENTS)) & zmq.POLLIN:
            client, *frames = self._socket.recv_multipart()
            if (command := self._read(client, b"".join(frames))) is not None:
                commands.append((client, command))
        return commands

    def send(self, client: ClientId, message: FromWorker) -> bool:
        """Hand a message to one client; False where the client is gone."""
        try:
            self._socket.send_multipart([client, self._encoder.encode(message)])
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self._clients.discard(client)
            return False
        return True

    def close(self) -> None:
        """Let the last messages out (a second at most) and unbind. May be called twice."""
        self._socket.close(linger=_LINGER_MS)
        self._context.term()

    def _bind(self, endpoint: str) -> None:
        for option, value in socket_options(endpoint).items():
            self._socket.set(option, value)
        # A send to a client that left is an error instead of silence; so its requests can be aborted.
        self._socket.set(zmq.SocketOption.ROUTER_MANDATORY, 1)
        self._poller.register(self._socket, zmq.POLLIN)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"endpoint={endpoint!r}: cannot listen there ({error}); give a free port of an address of this machine"
            ) from error
        if is_exposed(endpoint):
            logger.warning("%s can be reached from other machines and asks for no password", endpoint)

    def _read(self, client: ClientId, payload: bytes) -> Command | None:
        try:
            message = self._decoder.decode(payload)
        except msgspec.DecodeError as error:
            self._turn_away(client, f"the worker cannot read a message of this client: {error}")
            return None
        if isinstance(message, Hello):
            self._welcome(client, message)
            return None
        if client not in self._clients:
            self._turn_away(client, "the worker was sent a command before a Hello that it accepted")
            return None
        return message

    def _welcome(self, client: ClientId, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            versions = f"the worker speaks version {PROTOCOL_VERSION}, this client version {hello.version}"
            self._turn_away(client, f"{versions}: install the same release on both sides")
        elif self.send(client, self._greeting):
            self._clients.add(client)

    def _turn_away(self, client: ClientId, error: str) -> None:
        logger.warning("a client was turned away: %s", error)
        self.send(client, Failed(error=error, retry=False))
