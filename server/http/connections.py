"""What a connection may take beside and before a request: bytes of headers, time for headers, body and answer; and how
many connections there may be. All of it holds before any API key is looked at.
"""

import asyncio
import resource
from collections import Counter
from dataclasses import dataclass
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cllm_core.errors import CllmError

from .errors import HeadersTooLarge, RequestTooSlow, TooManyConnections, error_response

_log = structlog.stdlib.get_logger(__name__)

# For the worker's sockets, log files, the response store and the like.
_OTHER_DESCRIPTORS = 128
_MOST_DESCRIPTORS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Bounds of connections.

    Attributes:
        max_header_bytes: of one request, its first line included.
        header_timeout: seconds from the first byte of a request to the end of its headers.
        body_timeout: seconds from there to the end of its body.
        send_timeout: seconds in which a client must take some of an answer that waits to be sent.
        idle_timeout: seconds in which a new connection must send something.
        max_connections: in all.
        max_client_connections: of one address, None for as many as there may be in all.
    """

    max_header_bytes: int
    header_timeout: float
    body_timeout: float
    send_timeout: float
    idle_timeout: float
    max_connections: int
    max_client_connections: int | None = None


class Connections:
    """The connections that are open now, and how many were refused or cut, by reason."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.num_cut: Counter[str] = Counter()
        self._num_of_client: Counter[str] = Counter()

    @property
    def num_open(self) -> int:
        """In all."""
        return self._num_of_client.total()

    def add(self, client: str) -> None:
        """Count a new connection."""
        self._num_of_client[client] += 1

    def remove(self, client: str) -> None:
        """A connection is closed."""
        self._num_of_client[client] -= 1
        if not self._num_of_client[client]:
            del self._num_of_client[client]

    def refusal(self, client: str) -> TooManyConnections | None:
        """Why the newest connection, of this client, is one too many; None where it is not."""
        most = self.limits.max_client_connections
        if most is not None and self._num_of_client[client] > most:
            return TooManyConnections(f"{most} connections of this address are open already: close some")
        if self.num_open > self.limits.max_connections:
            return TooManyConnections(f"{self.limits.max_connections} connections are open already: try again later")
        return None


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol within limits.

    Args:
        connections: shared by all protocols of a server.
        arguments: uvicorn's own.
    """

    def __init__(self, *, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._connections = connections
        self._limits = connections.limits
        self._awaits_first_byte = True
        self._is_in_headers = True  # or before them
        self._num_header_bytes = 0
        self._num_unsent = 0
        self._reading: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    @property
    def _client_address(self) -> str:
        return self.client[0] if self.client else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Count the connection and wait for its first byte."""
        super().connection_made(transport)
        self._connections.add(self._client_address)
        error = self._connections.refusal(self._client_address)
        if error is None:
            self._expect(self._limits.idle_timeout, None)
        else:
            self._cut("too_many_connections", error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._connections.remove(self._client_address)
        self._stop_reading_timer()
        self._stop_sending_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; headers only as far as they may go."""
        if self._awaits_first_byte:
            self._awaits_first_byte = False
            self._stop_reading_timer()
        while self._is_in_headers and data and not self.transport.is_closing():
            # One byte more than there may be: the parser tells where the headers end, and with it what counts.
            piece = data[: self._limits.max_header_bytes + 1 - self._num_header_bytes]
            data = data[len(piece) :]
            self._num_header_bytes += len(piece)
            super().data_received(piece)
            if self._is_in_headers and self._num_header_bytes > self._limits.max_header_bytes:
                most = self._limits.max_header_bytes
                self._cut(
                    "headers_too_large", HeadersTooLarge(f"the headers are longer than {most} bytes: shorten them")
                )
        if data and not self.transport.is_closing():
            super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._expect(self._limits.header_timeout, "headers")

    def on_headers_complete(self) -> None:
        """The body begins."""
        self._is_in_headers = False
        self._expect(self._limits.body_timeout, "body")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is here."""
        self._stop_reading_timer()
        self._is_in_headers, self._num_header_bytes = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is written, perhaps not sent."""
        super().on_response_complete()
        self._watch_sending()

    def pause_writing(self) -> None:
        """The client takes less than there is for it."""
        super().pause_writing()
        self._watch_sending()

    def _expect(self, seconds: float, part: str | None) -> None:
        """Cut the connection unless the next part of a request, None for its first byte, is here in time."""
        self._stop_reading_timer()
        self._reading = self.loop.call_later(seconds, self._on_slow_request, seconds, part)

    def _on_slow_request(self, seconds: float, part: str | None) -> None:
        if self.transport.is_closing():
            return
        if self.flow.read_paused:  # it is the server that does not read
            self._expect(seconds, part)
        elif part is None:
            self.transport.close()
        else:
            error = RequestTooSlow(f"the {part} of the request did not arrive within {seconds:g} s: send it faster")
            self._cut(f"slow_{part}", error)

    def _watch_sending(self) -> None:
        """Cut the connection when nothing of what waits to be sent is taken for too long."""
        self._stop_sending_timer()
        self._num_unsent = self.transport.get_write_buffer_size()
        if self._num_unsent:
            self._sending = self.loop.call_later(self._limits.send_timeout, self._on_slow_reader)

    def _on_slow_reader(self) -> None:
        if 0 < self._num_unsent <= self.transport.get_write_buffer_size():
            self._connections.num_cut["slow_reader"] += 1
            _log.warning("connection cut: the client does not read its answer", client=self._client_address)
            self.transport.abort()
        else:
            self._watch_sending()

    def _cut(self, reason: str, error: CllmError) -> None:
        """Answer with an error, where no other answer has begun, and close."""
        self._connections.num_cut[reason] += 1
        _log.warning("connection refused", reason=reason, client=self._client_address)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            response = error_response(error, request_id="")
            headers = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
            self.transport.write(
                STATUS_LINE[response.status_code] + headers + b"connection: close\r\n\r\n" + bytes(response.body)
            )
        self.transport.close()

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_sending_timer(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None


def raise_descriptor_limit() -> int:
    """Let this process open as many files as the system allows; returns how many connections that leaves."""
    soft, hard = (_finite(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(1, hard - _OTHER_DESCRIPTORS)


def _finite(limit: int) -> int:
    return _MOST_DESCRIPTORS if limit == resource.RLIM_INFINITY else min(limit, _MOST_DESCRIPTORS)
