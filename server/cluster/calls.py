"""One HTTP request as a value, and an ASGI app that answers it in this process: what goes from gateway to replica."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

_PARTS = (
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)


@dataclass(frozen=True, slots=True)
class HttpCall:
    """A request with its whole body.

    Attributes:
        scope: of ASGI, as far as it can be sent to another process.
        body: bytes as they came.
    """

    scope: dict[str, Any]
    body: bytes

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> "HttpCall":
        """Of a connection."""
        return cls({name: scope[name] for name in _PARTS if name in scope}, body)


async def answer(app: ASGIApp, call: HttpCall) -> AsyncGenerator[list[Message]]:
    """What the app sends, in lists of all that is there; a generator that is closed early is a client that left."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    has_left = asyncio.Event()
    pending: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if pending:
            return pending.pop()
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, **call.scope}
        try:
            await app(scope, receive, sent.put)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (messages := await _all_there(sent))[-1] is not None:
            yield [message for message in messages if message is not None]
        if rest := [message for message in messages if message is not None]:
            yield rest
        await task
    finally:
        has_left.set()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _all_there(queue: "asyncio.Queue[Message | None]") -> list[Message | None]:
    found = [await queue.get()]
    while not queue.empty():
        found.append(queue.get_nowait())
    return found
