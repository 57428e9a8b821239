"""What goes wrong: each fault is a coroutine that does its harm to a running server and ends."""

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from tests.server.serve_process import ServeProcess

Fault = Callable[["Target"], Awaitable[str]]
"""Does its harm; returns what its own clients saw, in a few words."""

CLIENTS = 12
ENDLESS = {"model": "tiny", "prompt": "Once upon", "ignore_eos": True, "max_tokens": 400, "stream": True}
STORED = {"model": "tiny", "input": "Hi", "max_output_tokens": 16, "store": True}
HOSTILE_FORMS: tuple[dict[str, object], ...] = (
    {"guided_regex": "(a{1,5000}){1,5000}"},
    {"guided_regex": "(" * 200},
    {"guided_grammar": "start: start start"},
    {"guided_json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}},
    {"guided_json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    {"guided_json": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}}},
    {"guided_choice": ["x" * 2000] * 30},
)
HOSTILE_BODIES: tuple[bytes, ...] = (
    b"[" * 100_000,
    b'{"model": "tiny", "prompt": "' + b"\\ud800" * 1000 + b'"}',
    b'{"prompt": 1e999}',
    b"\x00\xff" * 1000,
    b'{"model": "tiny", "prompt": [' + b"-1," * 5000 + b"1]}",
    json.dumps({"model": "tiny", "prompt": "x", "stop": ["y"] * 5000}).encode(),
    json.dumps({"model": "tiny", "prompt": "x", "logit_bias": {str(10**30): 1}}).encode(),
    json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "{{ 10**10**10 }}"}] * 50}).encode(),
)


class Target:
    """The server that faults are done to.

    Args:
        served: runs.
        clock: file whose content, in seconds, is added to the server's wall clock.
    """

    def __init__(self, served: ServeProcess, clock: Path) -> None:
        self.served = served
        self.clock = clock
        assert served.pid is not None
        self.process = psutil.Process(served.pid)
        host, port = served.url.removeprefix("http://").split(":")
        self.address = host, int(port)

    @property
    def processes(self) -> list[psutil.Process]:
        """Of the worker and, behind it, the one that stands by, which is always started later."""
        return sorted(self.process.children(), key=psutil.Process.create_time)

    def client(self) -> httpx.AsyncClient:
        """For a fault's own requests."""
        return httpx.AsyncClient(base_url=self.served.url, timeout=60, verify=False)


async def killed_worker(target: Target) -> str:
    """SIGKILL for the worker, as of a kernel that is out of memory."""
    _signal(target, signal.SIGKILL)
    return await _until_ready(target)


async def stopped_worker(target: Target) -> str:
    """SIGSTOP for the worker, which hangs from then on."""
    _signal(target, signal.SIGSTOP)
    await asyncio.sleep(1.0)
    return await _until_ready(target)


async def killed_standby(target: Target) -> str:
    """SIGKILL for the process that stands by."""
    for process in target.processes[1:]:
        process.kill()
    return "nothing"


async def vanishing_clients(target: Target) -> str:
    """Clients that leave in the middle of a stream."""

    async def vanish(client: httpx.AsyncClient) -> None:
        with contextlib.suppress(httpx.HTTPError):
            async with client.stream("POST", "/v1/completions", json=ENDLESS) as answer:
                async for _ in answer.aiter_bytes():
                    return

    async with target.client() as client:
        await asyncio.gather(*(vanish(client) for _ in range(CLIENTS)))
    return "they left"


async def unread_answers(target: Target) -> str:
    """Clients that never read what they are sent."""
    body = json.dumps({**ENDLESS, "n": 4, "logprobs": 5}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    writers = []
    for _ in range(CLIENTS):
        _, writer = await asyncio.open_connection(*target.address, limit=1024)
        writer.write(request + body)
        writers.append(writer)
    await asyncio.sleep(2.0)
    for writer in writers:
        writer.transport.abort()
    return "nothing, and left"


async def header_flood(target: Target) -> str:
    """Headers without an end."""
    return await _flood(target, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"A: " + b"x" * 8000 + b"\r\n")


async def body_flood(target: Target) -> str:
    """Bodies far over the limit, announced or not."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return await _flood(target, head + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n")


async def slow_requests(target: Target) -> str:
    """Headers and bodies that come a byte at a time."""
    post = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    heads = (b"GET / HTTP/1.1\r\nA: ", post)
    pairs = [await asyncio.open_connection(*target.address) for _ in range(CLIENTS)]
    for number, (_, writer) in enumerate(pairs):
        writer.write(heads[number % 2])
    ends = asyncio.get_running_loop().time() + 3.5
    while asyncio.get_running_loop().time() < ends:
        for _, writer in pairs:
            if not writer.is_closing():
                writer.write(b"x")
        await asyncio.sleep(0.2)
    for pair in pairs:
        await _last_words(*pair)
    num_cut = sum(reader.at_eof() or reader.exception() is not None for reader, _ in pairs)
    assert num_cut == CLIENTS, num_cut
    return "all were cut, with 408 where it was still read"


async def broken_bodies(target: Target) -> str:
    """Bodies cut, twisted and hostile."""
    rng = random.Random(0)
    good = json.dumps({"model": "tiny", "prompt": "Once upon", "max_tokens": 2, "temperature": 0}).encode()
    twisted = [bytes(b if rng.random() > 0.05 else rng.randrange(256) for b in good) for _ in range(40)]
    cut = [good[: rng.randrange(len(good))] for _ in range(20)]
    statuses = set()
    async with target.client() as client:
        for body in (*HOSTILE_BODIES, *twisted, *cut):
            path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
            answer = await client.post(path, content=body, headers={"content-type": "application/json"})
            statuses.add(answer.status_code)
    assert statuses <= {200, 400, 404, 413, 429, 503}, statuses
    return f"statuses {sorted(statuses)}"


async def hostile_forms(target: Target) -> str:
    """Schemas, regexes and grammars that are huge, deep, endless or wrong."""
    async with target.client() as client:
        bodies = [{"model": "tiny", "prompt": "x", "max_tokens": 4, **form} for form in HOSTILE_FORMS]
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
    statuses = {answer.status_code for answer in answers}
    assert statuses <= {200, 400, 429, 503}, statuses
    return f"statuses {sorted(statuses)}"


async def full_disk(target: Target) -> str:
    """No file of the server can grow: neither the store of responses nor the log."""
    async with target.client() as client:
        with _no_file_grows(target.process):
            full = [await client.post("/v1/responses", json={**STORED, "input": "x" * 200}) for _ in range(4)]
        after = await client.post("/v1/responses", json=STORED)
    assert all(answer.status_code in (200, 503, 429) for answer in (*full, after))
    assert not any(answer.json()["store"] for answer in full if answer.status_code == 200)
    assert after.status_code != 200 or after.json()["store"]
    return "answers, not stored; stored again once files could grow"


async def clock_jumps(target: Target) -> str:
    """The wall clock goes forth and back by hours."""
    for seconds in (3600, -86400, 0):
        target.clock.write_text(str(seconds))
        await asyncio.sleep(0.5)
    return "nothing"


async def adapter_churn(target: Target) -> str:
    """Adapters that come and go."""
    statuses = set()
    async with target.client() as client:
        for number in range(6):
            name = {"lora_name": f"churn{number % 2}"}
            for path, body in (("load", {**name, "lora_path": "chat"}), ("unload", name)):
                statuses.add((await client.post(f"/v1/{path}_lora_adapter", json=body)).status_code)
    assert statuses <= {200, 400, 404, 503}, statuses
    return f"statuses {sorted(statuses)}"


ALL: tuple[Fault, ...] = (
    killed_worker,
    vanishing_clients,
    unread_answers,
    header_flood,
    body_flood,
    slow_requests,
    broken_bodies,
    hostile_forms,
    full_disk,
    clock_jumps,
    adapter_churn,
    killed_standby,
    stopped_worker,
)

SHORT: tuple[Fault, ...] = (
    vanishing_clients,
    header_flood,
    broken_bodies,
    hostile_forms,
    full_disk,
    clock_jumps,
    adapter_churn,
    killed_worker,
)


def _signal(target: Target, number: signal.Signals) -> None:
    for process in target.processes[:1]:
        os.kill(process.pid, number)


async def _until_ready(target: Target) -> str:
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with target.client() as client:
        while (await client.get("/ready")).status_code == 200 and loop.time() - began < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        while (await client.get("/ready")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return f"ready again after {loop.time() - began:.1f} s"


async def _flood(target: Target, head: bytes, piece: bytes) -> str:
    async def flood() -> bytes:
        reader, writer = await asyncio.open_connection(*target.address)
        with contextlib.suppress(OSError):
            writer.write(head)
            for _ in range(1000):
                writer.write(piece)
                await writer.drain()
        return await _last_words(reader, writer)

    words = await asyncio.gather(*(flood() for _ in range(CLIENTS)))
    statuses = sorted({text.split(b" ")[1].decode() for text in words if text.startswith(b"HTTP/1.1 ")})
    assert set(statuses) <= {"413", "431"}, statuses
    return f"cut; {', '.join(statuses) or 'no status'} where it was still read"


async def _last_words(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What the server said last, before it closed."""
    words = b""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(5):
            while piece := await reader.read(65536):
                words += piece
    writer.transport.abort()
    return words


@contextmanager
def _no_file_grows(process: psutil.Process) -> Iterator[None]:
    before = process.rlimit(resource.RLIMIT_FSIZE)
    assert isinstance(before, tuple)
    process.rlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        process.rlimit(resource.RLIMIT_FSIZE, before)
