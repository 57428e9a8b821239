"""RequestStream: the outputs of one request for one reader. LiveStreams: those of all requests that have not ended.

Neither knows sockets; both belong to one event loop.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Literal

from cllm_core.errors import InvalidRequest
from cllm_core.request import DecodingStats, NewRequest, RequestOutput


class RequestStream(AsyncGenerator[RequestOutput]):
    """Yields the outputs of a request; the last one has a finish_reason.

    Unlike a plain async generator it also notices being closed before its first output was asked for. It must be
    read to its end or closed, else its request runs on unread. The queue is unbounded, so a slow reader delays
    nobody; max_tokens bounds it.

    Args:
        request: that the outputs belong to.
        on_abandon: called, at most once, when the reader leaves before the last output has come.
    """

    def __init__(self, request: NewRequest, on_abandon: Callable[[str], None]) -> None:
        self._request_id = request.request_id
        self._on_abandon = on_abandon
        self._queue: asyncio.Queue[RequestOutput | InvalidRequest | None] = asyncio.Queue()
        self._stats = DecodingStats(num_prompt_tokens=len(request.prompt_ids))
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether the last output has come or the reader has left; later outputs are ignored."""
        return self._is_complete

    def push(self, output: RequestOutput) -> None:
        """Add the next output; ignored once the stream is complete."""
        if self._is_complete:
            return
        self._is_complete = output.finish_reason is not None
        self._stats = output.stats
        self._queue.put_nowait(output)

    def end(self, finish_reason: Literal["abort", "error"], error: str | None = None) -> None:
        """Add a last output on behalf of a worker that will not; ignored once the stream is complete."""
        self.push(
            RequestOutput(request_id=self._request_id, finish_reason=finish_reason, error=error, stats=self._stats)
        )

    def refuse(self, error: str) -> None:
        """Raise InvalidRequest in the reader; ignored once the stream is complete."""
        if not self._is_complete:
            self._is_complete = True
            self._queue.put_nowait(InvalidRequest(error))

    async def asend(self, value: None) -> RequestOutput:
        """The next output; StopAsyncIteration after the last one. A cancelled wait abandons the request.

        Raises:
            InvalidRequest: the worker did not take the request.
        """
        if self._is_complete and self._queue.empty():
            raise StopAsyncIteration
        try:
            output = await self._queue.get()
        except asyncio.CancelledError:
            self._abandon()
            raise
        if output is None:
            raise StopAsyncIteration
        if isinstance(output, InvalidRequest):
            raise output
        return output

    async def athrow(
        self,
        kind: type[BaseException] | BaseException,
        value: BaseException | object = None,
        trace: TracebackType | None = None,
    ) -> RequestOutput:
        """Abandon the request and raise what was thrown."""
        self._abandon()
        raise value if isinstance(value, BaseException) else kind

    async def aclose(self) -> None:
        """Leave; a request that has not ended is abandoned."""
        self._abandon()

    def _abandon(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()
        if self._is_complete:
            return
        self._is_complete = True
        # Wakes a reader that waits in another task.
        self._queue.put_nowait(None)
        self._on_abandon(self._request_id)


class LiveStreams:
    """The streams of all requests whose last output has not come from the worker, abandoned ones included.

    So an id, and a slot of the queue, is free again only when the worker is done with the request.
    """

    def __init__(self) -> None:
        self._streams: dict[str, RequestStream] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request: NewRequest, on_abandon: Callable[[str], None]) -> RequestStream:
        """Make the stream of a new request; InvalidRequest where its id is taken."""
        if request.request_id in self._streams:
            raise InvalidRequest(
                f"request_id={request.request_id!r}: a request of this id is running; choose another",
                param="request_id",
            )
        stream = RequestStream(request, on_abandon)
        self._streams[request.request_id] = stream
        self._idle.clear()
        return stream

    def deliver(self, output: RequestOutput) -> None:
        """Pass an output on to its stream; the last one ends it. Outputs of unknown requests are late and ignored."""
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        stream.push(output)
        if output.finish_reason is not None:
            self._remove(output.request_id)

    def reject(self, request_id: str, error: str) -> None:
        """End one stream, for a request that the worker did not take."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.refuse(error)
            self._remove(request_id)

    def abort_all(self) -> tuple[str, ...]:
        """End every stream with "abort" now; returns the ids that the worker has to abort."""
        running = {request_id: stream for request_id, stream in self._streams.items() if not stream.is_complete}
        for stream in running.values():
            stream.end("abort")
        return tuple(running)

    def fail_all(self, error: str) -> None:
        """End every stream with an error, for a worker that is lost."""
        for stream in self._streams.values():
            stream.end("error", error)
        self._streams.clear()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Return when no request is left."""
        await self._idle.wait()

    def _remove(self, request_id: str) -> None:
        del self._streams[request_id]
        if not self._streams:
            self._idle.set()
