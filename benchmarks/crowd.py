"""What hostile and heavy requests cost the others: stalls of the event loop, and a thousand idle connections.

    python -m benchmarks.crowd [MODEL] [--connections 1000] [--rounds 3]

**Stalls**: the longest time that the server's event loop stood still while it handled one request of each kind, the
largest that the limits permit. Every stream waits as long.

**Connections**: half of them say nothing, half send a byte of a header each second; the time of a short request with
them over that without them, in turns.
"""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.synchronize import Event

import httpx

from cllm_core.logs import configure_logging
from server.cli.serve import DrainingServer, make_engine
from server.http.connections import raise_descriptor_limit
from server.settings import ServerSettings

SHORT: Mapping[str, object] = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
NUM_SHORT = 500
PROBE_SECONDS = 0.001

Body = Mapping[str, object]


@contextmanager
def served(model: str | None) -> Iterator[tuple[DrainingServer, asyncio.AbstractEventLoop, str]]:
    """A server in a thread of this process, its event loop and its URL."""
    # Longer than it takes to open a thousand connections and to send to each of them.
    settings = ServerSettings(model=model, port=0, header_timeout=600, log_level="error")
    server = DrainingServer(make_engine(settings), settings)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        url = f"http://{host}:{port}"
        while httpx.get(f"{url}/ready").status_code != 200:
            time.sleep(0.1)
        yield server, loops[0], url
    finally:
        server.should_exit = True
        thread.join()


def kinds() -> dict[str, tuple[str, Body]]:
    """Path and body of the largest request of each kind."""
    user = {"role": "user", "content": "Hello"}
    wide = {"type": "object", "properties": {f"property{n}": {"type": "string"} for n in range(1200)}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    tools = [{**tool, "function": {**tool["function"], "name": f"function{n}"}} for n in range(128)]  # type: ignore[dict-item]
    chat, completions = "/v1/chat/completions", "/v1/completions"
    return {
        "16,000 log-probabilities": (
            chat,
            {"messages": [user], "logprobs": True, "top_logprobs": 20, "max_tokens": 775, "ignore_eos": True},
        ),
        "the same, streamed": (
            chat,
            {
                "messages": [user],
                "logprobs": True,
                "top_logprobs": 20,
                "max_tokens": 775,
                "ignore_eos": True,
                "stream": True,
            },
        ),
        "a prompt of 8,000 tokens, as text": (completions, {"prompt": "hello " * 8000, "max_tokens": 1}),
        "the same, as token ids": (completions, {"prompt": [19556] * 8000, "max_tokens": 1}),
        "a prompt of 8 MB, refused": (completions, {"prompt": "x" * 8_000_000}),
        "1,000 messages": (chat, {"messages": [user] * 1000, "max_tokens": 1}),
        "a schema of 60 kB": (
            chat,
            {
                "messages": [user],
                "max_tokens": 4,
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": wide}},
            },
        ),
        "a regex that explodes": (completions, {**SHORT, "guided_regex": "(a{1,900}b?){1,900}"}),
        "128 tools": (chat, {"messages": [user], "max_tokens": 4, "tools": tools}),
        "n = 128": (completions, {"prompt": "Hello", "max_tokens": 8, "n": 128, "temperature": 1}),
        "log-probabilities of a prompt of 750 tokens": (
            completions,
            {"prompt": [19556] * 750, "max_tokens": 1, "echo": True, "logprobs": 20},
        ),
    }


def longest_stall(loop: asyncio.AbstractEventLoop, url: str, path: str, body: Body) -> tuple[float, int]:
    """Longest time in seconds that the loop stood still while the request was handled, and its status."""
    gaps = [0.0]

    async def watch() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(PROBE_SECONDS)
            gaps.append(time.perf_counter() - before - PROBE_SECONDS)

    payload = json.dumps(body).encode()  # before the watch begins: it shares our interpreter
    watching = asyncio.run_coroutine_threadsafe(watch(), loop)
    # In a process of its own it would need no turn of this interpreter; http.client reads in few, long calls.
    with contextlib.closing(_connection(url)) as connection:
        connection.request("POST", path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        while response.read(1 << 20):
            pass
    watching.cancel()
    return max(gaps), response.status


def _connection(url: str) -> http.client.HTTPConnection:
    host, port = url.removeprefix("http://").split(":")
    return http.client.HTTPConnection(host, int(port), timeout=600)


@contextmanager
def crowd(url: str, number: int) -> Iterator[None]:
    """A process with so many connections that do not ask for anything, half of them slowly sending headers."""
    spawn = multiprocessing.get_context("spawn")
    stands, leaving = spawn.Event(), spawn.Event()
    process = spawn.Process(target=_stand_around, args=(url, number, stands, leaving))
    process.start()
    stands.wait()
    try:
        yield
    finally:
        leaving.set()
        process.join()


def _stand_around(url: str, number: int, stands: Event, leaving: Event) -> None:
    raise_descriptor_limit()
    host, port = url.removeprefix("http://").split(":")
    peers = [socket.create_connection((host, int(port))) for _ in range(number)]
    slow = peers[::2]
    for peer in slow:
        peer.sendall(b"GET /v1/models HTTP/1.1\r\nA: ")
    stands.set()
    pause = 1.0 / max(1, len(slow))
    for peer in itertools.cycle(slow):  # each once a second, not all at once
        if leaving.wait(pause):
            break
        peer.send(b"x")


def times(url: str) -> list[float]:
    """Seconds of short requests, one after the other."""
    with httpx.Client(base_url=url, timeout=60) as client:
        return [_timed(lambda: client.post("/v1/completions", json=SHORT).raise_for_status()) for _ in range(NUM_SHORT)]


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    configure_logging(level="error", log_format="console")
    raise_descriptor_limit()
    with served(options.model) as (_, loop, url):
        print("| request | status | longest stall, ms (median of rounds) |\n| --- | --- | --- |")
        for name, (path, body) in kinds().items():
            found = [longest_stall(loop, url, path, body) for _ in range(options.rounds)]
            stall = statistics.median(seconds for seconds, _ in found)
            print(f"| {name} | {found[0][1]} | {1000 * stall:.1f} |", flush=True)
        ratios = []
        for _ in range(options.rounds):
            alone = times(url)
            with crowd(url, options.connections):
                beside = times(url)
            ratios.append(p99(beside) / p99(alone))
            print(
                f"{options.connections} connections: p99 {1000 * p99(beside):.1f} ms, {1000 * p99(alone):.1f} without; "
                f"median {1000 * statistics.median(beside):.1f} ms, {1000 * statistics.median(alone):.1f} without",
                flush=True,
            )
        print(f"p99 with over without, median of rounds: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
