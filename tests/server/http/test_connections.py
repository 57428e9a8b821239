"""A connection takes no more than it may, before any key is looked at: bytes, time and number; others do not notice."""

import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.server.fakes import MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running, wait_until

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
BODY = json.dumps({"model": MODEL_NAME, "prompt": "Hi", "max_tokens": 4}).encode()


@contextmanager
def connected(server: RunningServer, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A raw connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as peer:
        if receive_buffer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        peer.settimeout(10)
        peer.connect((host, int(port)))
        yield peer


def read_all(peer: socket.socket) -> bytes:
    """What comes until the other side closes, or drops the connection."""
    received = b""
    try:
        while piece := peer.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def readable(peer: socket.socket, *, seconds: float) -> bool:
    return bool(select.select([peer], [], [], seconds)[0])


def post(body: bytes, *headers: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + b"".join(header + b"\r\n" for header in headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def error_of(answer: bytes) -> tuple[bytes, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b" ", 2)[1], json.loads(body)["error"]["code"]


@pytest.mark.parametrize("piece", [1000, 100_000], ids=["in pieces", "at once"])
@pytest.mark.parametrize("headers", [b"A: " + b"x" * 100_000, b"A: x\r\n" * 20_000], ids=["one header", "many headers"])
def test_headers_over_the_limit_are_refused_before_their_end(headers: bytes, piece: int) -> None:
    with running(ScriptedEngine(), api_keys="secret", max_header_bytes=4096) as server, connected(server) as peer:
        data = GET + headers
        try:
            for start in range(0, len(data), piece):
                peer.sendall(data[start : start + piece])
        except (ConnectionResetError, BrokenPipeError):
            return  # closed before all of it was sent
        answer = read_all(peer)
    assert answer == b"" or error_of(answer) == (b"431", "headers_too_large")


def test_headers_just_over_the_limit_are_told_so() -> None:
    with running(ScriptedEngine(), max_header_bytes=4096) as server, connected(server) as peer:
        peer.sendall(GET + b"A: " + b"x" * 4096)
        assert error_of(read_all(peer)) == (b"431", "headers_too_large")


def test_bodies_do_not_count_as_headers_and_every_request_of_a_connection_counts_anew() -> None:
    body = json.dumps({"model": MODEL_NAME, "prompt": "Hi", "max_tokens": 2, "user": "x" * 5000}).encode()
    with running(ScriptedEngine(), max_header_bytes=2048) as server, connected(server) as peer:
        for _ in range(3):
            peer.sendall(post(body, b"A: " + b"x" * 1500))
            assert readable(peer, seconds=5)
        peer.sendall(post(BODY) + post(BODY) + GET + b"Connection: close\r\n\r\n")
        assert read_all(peer).count(b"HTTP/1.1 200 OK") == 6


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (GET, (b"408", "request_too_slow")),
        (post(b"x" * 100)[:-50], (b"408", "request_too_slow")),
    ],
    ids=["headers", "body"],
)
def test_a_request_that_does_not_arrive_in_time_is_refused(sent: bytes, answer: tuple[bytes, str]) -> None:
    with running(ScriptedEngine(), header_timeout=0.2, body_timeout=0.3) as server, connected(server) as peer:
        started = time.monotonic()
        peer.sendall(sent)
        assert error_of(read_all(peer)) == answer
        assert time.monotonic() - started < 5


def test_a_trickle_of_headers_ends_in_time_too() -> None:
    with running(ScriptedEngine(), header_timeout=0.3) as server, connected(server) as peer:
        started = time.monotonic()
        peer.sendall(GET)
        while not readable(peer, seconds=0.05) and time.monotonic() - started < 5:
            peer.sendall(b"A: x\r\n")
        assert error_of(read_all(peer)) == (b"408", "request_too_slow")
        assert time.monotonic() - started < 5


def test_an_answer_that_takes_longer_than_the_body_may_is_not_cut() -> None:
    with running(ScriptedEngine(step_seconds=0.2), body_timeout=0.1, header_timeout=0.1) as server:
        answer = server.shared_http.post("/v1/completions", content=BODY, headers={"content-type": "application/json"})
        assert answer.status_code == 200


def test_further_connections_are_refused_and_taken_again_once_one_has_closed() -> None:
    with running(ScriptedEngine(), max_connections=2) as server:
        server.shared_http.close()  # the harness keeps one open
        wait_until(lambda: connections_of(server) == 0)
        with connected(server), connected(server):
            wait_until(lambda: connections_of(server) == 2)
            with connected(server) as third:
                assert error_of(read_all(third)) == (b"503", "too_many_connections")
        wait_until(lambda: connections_of(server) == 0)
        with connected(server) as peer:
            peer.sendall(GET + b"Connection: close\r\n\r\n")
            assert b" 200 " in read_all(peer)


def test_one_address_may_have_so_many() -> None:
    with running(ScriptedEngine(), max_client_connections=1) as server:
        server.shared_http.close()
        wait_until(lambda: connections_of(server) == 0)
        with connected(server), connected(server) as second:
            assert b"connections of this address" in read_all(second)


def connections_of(server: RunningServer) -> int:
    return server.in_loop(lambda: server._server.connections.num_open)


ENDLESS = json.dumps({"model": MODEL_NAME, "prompt": "Hi", "max_tokens": 9 * 10**6, "stream": True}).encode()


def talkative_engine() -> ScriptedEngine:
    """Says more than all buffers on the way hold."""
    return ScriptedEngine(endless=True, chunk_sizes=(4000,), step_seconds=0.002, info=make_info(max_model_len=10**7))


def test_a_client_that_reads_nothing_is_let_go_and_its_request_ended() -> None:
    engine = talkative_engine()
    with running(engine, send_timeout=0.3) as server, connected(server, receive_buffer=4096) as peer:
        peer.sendall(post(ENDLESS))
        wait_until(lambda: engine.num_open == 1)
        wait_until(lambda: engine.num_open == 0)
        assert len(engine.aborted) == 1


def test_a_client_that_reads_slowly_is_not_let_go() -> None:
    engine = talkative_engine()
    with running(engine, send_timeout=0.4) as server, connected(server, receive_buffer=4096) as peer:
        peer.sendall(post(ENDLESS))
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            assert peer.recv(60_000)
            time.sleep(0.02)
        assert engine.num_open == 1


def test_a_silent_connection_costs_nobody_anything() -> None:
    with running(ScriptedEngine()) as server, connected(server):
        assert server.shared_http.get("/health").status_code == 200
