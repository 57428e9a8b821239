"""WorkerLink: one connection of the API process to one incarnation of a worker.

A lost link is never repaired. A new one takes its place, so that nothing queued for a dead worker reaches the next.
"""

import asyncio
from collections.abc import Callable
from typing import cast

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from cllm_core.errors import EngineFailed
from cllm_core.worker.endpoint import socket_options
from cllm_core.worker.messages import FromWorker, ToWorker

_RECONNECT_MS = 20
_RECONNECT_MAX_MS = 1000

_CONNECTED = zmq.Event.HANDSHAKE_SUCCEEDED
_LOST = (
    zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class WorkerLink:
    """Connects at once, or as soon as the worker listens; messages sent before wait for that. Close it.

    Args:
        context: kept open by the caller for as long as the link.
        endpoint: where the worker listens.
    """

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        self._is_connected = False
        self._on_news: Callable[[], None] | None = None
        # No socket of zmq.asyncio: its futures and timers took longer than all else that is done for a step.
        self._socket: zmq.Socket[bytes] = zmq.Socket(context, zmq.DEALER)
        for option, value in socket_options(endpoint).items():
            self._socket.set(option, value)
        self._socket.set(zmq.SocketOption.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.set(zmq.SocketOption.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        # The context makes it, so this one is of zmq.asyncio.
        self._monitor = cast("zmq.asyncio.Socket", self._socket.get_monitor_socket(_CONNECTED | _LOST))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._notice)
        self._socket.connect(endpoint)

    @property
    def is_connected(self) -> bool:
        """Whether the worker was reached and not lost since, as far as wait_lost() has seen."""
        return self._is_connected

    def send(self, message: ToWorker) -> None:
        """Queue a message; never blocks."""
        self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        # The descriptor tells of a message once, and sending may take that sign away.
        self._loop.call_soon(self._notice)

    def notify(self, on_news: Callable[[], None] | None) -> None:
        """Call `on_news` whenever messages may be waiting, from the event loop: at first soon; None ends it.

        Called, it has to take them all: what it leaves is not told of again.
        """
        self._on_news = on_news
        self._loop.call_soon(self._notice)

    def receive_waiting(self) -> FromWorker | None:
        """The next message that is here, also where the link is lost by now; None where there is none.

        Raises:
            EngineFailed: it cannot be read.
        """
        if not self._has_message():
            return None
        return self._decode(self._socket.recv(zmq.NOBLOCK))

    async def wait_lost(self) -> None:
        """Return when the connection broke: the worker closed it, died, or gave no sign of life over TCP."""
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

    def _notice(self) -> None:
        if self._socket.closed:
            return
        # Asked also where nobody listens: the descriptor stays readable until then, and the event loop would turn.
        if self._has_message() and self._on_news is not None:
            self._on_news()

    def _has_message(self) -> bool:
        return bool(cast(int, self._socket.get(zmq.SocketOption.EVENTS)) & zmq.POLLIN)

    def _decode(self, payload: bytes) -> FromWorker:
        try:
            return self._decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise EngineFailed(
                f"a message of the worker cannot be read ({error}): install the same release on both sides"
            ) from error
