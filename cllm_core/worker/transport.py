"""The two ends of the wire between the API process and a worker, over ZeroMQ: WorkerSocket binds, Connection connects.

The worker binds, so that one started by hand and one started by the server look the same, and either side may start
first or come back. The transport is neither encrypted nor authenticated: whoever reaches the endpoint can use the model
and stop the worker. Keep it on loopback, on a private network, or on ipc. Knows messages, but nothing of the engine.
"""

import asyncio
import errno
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, cast

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from cllm_core.errors import ConfigError, InvalidRequest
from cllm_core.worker.messages import (
    PROTOCOL_VERSION,
    Abort,
    AdapterDone,
    Failed,
    FromWorker,
    Hello,
    LoadAdapter,
    Ping,
    Rejected,
    Shutdown,
    Submit,
    ToWorker,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)

ClientId = bytes
Command = Submit | Abort | LoadAdapter | UnloadAdapter | Ping | Shutdown

HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 4000

# How long the last messages of a worker that exits may take to reach its clients.
_LINGER_MS = 1000
_RECONNECT_MS = 20
_RECONNECT_MAX_MS = 1000

# What msgspec raises for bytes that are no message: its own error, but Python's for strings that are not UTF-8 and for
# values nested too deep.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_LOCAL_HOSTS = ("127.", "localhost", "[::1]")

_CONNECTED = zmq.Event.HANDSHAKE_SUCCEEDED
_LOST = (
    zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class Wakeable(Protocol):
    """Something whose file descriptor becomes readable when a waiting receive() should return."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


class WorkerSocket:
    """The worker's end: exchanges messages with any number of clients. Close it, or use it in `with`.

    Args:
        endpoint: tcp://ADDRESS:PORT or ipc://PATH to bind.
        greeting: the answer to a client's Hello, until `announce` changes it.

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
        """Those that said Hello and were not found disconnected since."""
        return frozenset(self._clients)

    def wake_on(self, source: Wakeable) -> None:
        """Let a waiting receive() also return when this becomes readable."""
        self._poller.register(source, zmq.POLLIN)

    def announce(self, greeting: FromWorker) -> None:
        """Send this to all clients, and from now on to every new one."""
        self._greeting = greeting
        for client in self.clients:
            self.send(client, greeting)

    def receive(self, wait_seconds: float | None) -> list[tuple[ClientId, Command]]:
        """All commands that have arrived; waits for one up to `wait_seconds` (None: without limit, 0: not at all)."""
        if wait_seconds != 0:
            self._poller.poll(None if wait_seconds is None else int(wait_seconds * 1000))
        commands = []
        # Checked between any two steps: setting up a poll takes several times as long.
        while cast(int, self._socket.get(zmq.SocketOption.EVENTS)) & zmq.POLLIN:
            client, *frames = self._socket.recv_multipart()
            if (command := self._read(client, b"".join(frames))) is not None:
                commands.append((client, command))
        return commands

    def send(self, client: ClientId, message: FromWorker) -> bool:
        """Send a message to one client; False where it has disconnected."""
        try:
            self._socket.send_multipart([client, self._encoder.encode(message)])
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self._clients.discard(client)
            return False
        return True

    def close(self) -> None:
        """Flush the last messages (a second at most) and unbind. May be called twice."""
        self._socket.close(linger=_LINGER_MS)
        self._context.term()

    def _bind(self, endpoint: str) -> None:
        _set_options(self._socket, endpoint)
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
        except _UNREADABLE as error:
            self._refuse(client, payload, f"the worker cannot read a message of this client: {error}")
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

    def _refuse(self, client: ClientId, payload: bytes, error: str) -> None:
        """Answer a message that cannot be decoded. It costs an accepted client no more than the request in it."""
        if client not in self._clients:
            self._turn_away(client, error)
            return
        logger.error("%s", error)
        match _decode_untyped(payload):
            case {"request": {"request_id": str(request_id)}}:
                self.send(client, Rejected(request_id, error, is_internal=True))
            case {"call_id": str(call_id)}:
                self.send(client, AdapterDone(call_id, error))

    def _turn_away(self, client: ClientId, error: str) -> None:
        logger.warning("a client was turned away: %s", error)
        self.send(client, Failed(error=error, retry=False))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message of the worker that cannot be decoded.

    Attributes:
        error: for people.
        request_ids: of the requests that it was for; empty where it does not show them.
    """

    error: str
    request_ids: tuple[str, ...]


class Connection:
    """The API process's end: one connection to one worker. Close it.

    It connects at once, or as soon as the worker listens; messages sent before are queued. A lost connection is never
    repaired. A new one takes its place, so that nothing queued for a dead worker reaches the next.

    Args:
        context: kept open by the caller for as long as the connection.
        endpoint: where the worker listens.
    """

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        self._is_connected = False
        self._on_messages: Callable[[], None] | None = None
        # Not a socket of zmq.asyncio: its futures and timers took longer than all other work for a step.
        self._socket: zmq.Socket[bytes] = zmq.Socket(context, zmq.DEALER)
        _set_options(self._socket, endpoint)
        self._socket.set(zmq.SocketOption.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.set(zmq.SocketOption.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        # The context makes it, so this one is of zmq.asyncio.
        self._monitor = cast("zmq.asyncio.Socket", self._socket.get_monitor_socket(_CONNECTED | _LOST))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._on_readable)
        self._socket.connect(endpoint)

    @property
    def is_connected(self) -> bool:
        """Whether the worker was reached and not lost since, as far as wait_lost() has seen."""
        return self._is_connected

    def encode(self, message: ToWorker) -> bytes:
        """A message as `send_encoded` takes it.

        Raises:
            InvalidRequest: a value in it cannot be encoded.
        """
        try:
            return self._encoder.encode(message)
        except (msgspec.EncodeError, TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"the request holds a value that cannot be sent to the worker: {error}") from error

    def send(self, message: ToWorker) -> None:
        """Queue a message; never blocks. Raises as `encode`."""
        self.send_encoded(self.encode(message))

    def send_encoded(self, payload: bytes) -> None:
        """Queue a message; never blocks."""
        self._socket.send(payload, zmq.NOBLOCK)
        # The descriptor becomes readable once for a message, and sending may reset it.
        self._loop.call_soon(self._on_readable)

    def notify(self, on_messages: Callable[[], None] | None) -> None:
        """Call `on_messages` from the event loop whenever messages may be waiting, first of all soon; None stops it.

        It has to take all of them: it is not called again for those that it leaves.
        """
        self._on_messages = on_messages
        self._loop.call_soon(self._on_readable)

    def receive_waiting(self) -> FromWorker | Unreadable | None:
        """The next message that has arrived, also where the connection is lost by now; None where there is none."""
        if not self._has_message():
            return None
        payload = self._socket.recv(zmq.NOBLOCK)
        try:
            return self._decoder.decode(payload)
        except _UNREADABLE as error:
            return Unreadable(
                f"a message of the worker cannot be read ({error}): install the same release on both sides",
                tuple(_request_ids_in(_decode_untyped(payload))),
            )

    async def wait_lost(self) -> None:
        """Return when the connection broke: the worker closed it, died, or missed its heartbeats over TCP."""
        while True:
            event = await recv_monitor_message(self._monitor)
            self._is_connected = event["event"] == _CONNECTED
            if not self._is_connected:
                return

    def close(self) -> None:
        """Disconnect; what was not sent yet is dropped."""
        self._loop.remove_reader(self._socket.FD)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def _on_readable(self) -> None:
        if self._socket.closed:
            return
        # Checked also without a listener: the descriptor stays readable until then, and the event loop would spin.
        if self._has_message() and self._on_messages is not None:
            self._on_messages()

    def _has_message(self) -> bool:
        return bool(cast(int, self._socket.get(zmq.SocketOption.EVENTS)) & zmq.POLLIN)


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


def _decode_untyped(payload: bytes) -> object:
    """A message of the wrong form, as plain values; None where it is not MessagePack."""
    try:
        return msgspec.msgpack.decode(payload)
    except _UNREADABLE:
        return None


def _request_ids_in(message: object) -> Iterator[str]:
    match message:
        case {"request_id": str(request_id)}:
            yield request_id
        case {"outputs": [*outputs]}:
            for output in outputs:
                yield from _request_ids_in(output)


def _set_options(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Options of either end.

    Nothing is dropped or blocked at a high-water mark. What is queued for a client is bounded by the max_tokens of its
    requests; a client without requests is sent one small report a second (Outbox).
    A closed ipc socket is noticed by itself. Over TCP the peer's host may vanish, so libzmq's own threads exchange
    heartbeats there, also while Python is busy with a long step or with loading.
    """
    socket.set(zmq.SocketOption.SNDHWM, 0)
    socket.set(zmq.SocketOption.RCVHWM, 0)
    if endpoint.startswith("tcp://"):
        socket.set(zmq.SocketOption.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.set(zmq.SocketOption.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.set(zmq.SocketOption.IPV6, int("[" in endpoint))
