"""RequestStream: the outputs of one request for one reader. LiveStreams: those of all requests that have not ended.

Neither knows sockets; both belong to one event loop.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from cllm_core.errors import InvalidRequest
from cllm_core.request import DecodingStats, ErrorCode, NewRequest, RequestOutput


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
        self._has_output = False

    @property
    def has_output(self) -> bool:
        """Whether any output has come; the reader may have sent it on."""
        return self._has_output

    @property
    def is_complete(self) -> bool:
        """Whether the last output has come or the reader has left; later outputs are ignored."""
        return self._is_complete

    def push(self, output: RequestOutput) -> None:
        """Add the next output; ignored once the stream is complete."""
        if self._is_complete:
            return
        self._is_complete = output.finish_reason is not None
        self._has_output = True
        self._stats = output.stats
        self._queue.put_nowait(output)

    def end(
        self, finish_reason: Literal["abort", "error"], error: str | None = None, code: ErrorCode | None = None
    ) -> None:
        """Add a last output in place of the worker's; ignored once the stream is complete."""
        code = code or ("failed" if finish_reason == "error" else None)
        self.push(
            RequestOutput(
                request_id=self._request_id,
                finish_reason=finish_reason,
                error=error,
                error_code=code,
                stats=self._stats,
            )
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
        self._live: dict[str, _LiveStream] = {}  # in the order of arrival
        self._num_of_user: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._live)

    def num_of_user(self, user: str) -> int:
        """Requests of one user."""
        return self._num_of_user[user]

    @property
    def requests(self) -> list[NewRequest]:
        """In the order of arrival."""
        return [live.request for live in self._live.values()]

    def open(self, request: NewRequest, on_abandon: Callable[[str], None]) -> RequestStream:
        """Make the stream of a new request; InvalidRequest where its id is taken."""
        if request.request_id in self._live:
            raise InvalidRequest(
                f"request_id={request.request_id!r}: a request of this id is running; choose another",
                param="request_id",
            )
        stream = RequestStream(request, on_abandon)
        self._live[request.request_id] = _LiveStream(request, stream)
        self._num_of_user[request.user] += 1
        self._idle.clear()
        return stream

    def deliver(self, output: RequestOutput) -> NewRequest | None:
        """Pass an output on to its stream; returns the request where that ended it.

        Outputs of unknown requests are late and ignored.
        """
        live = self._live.get(output.request_id)
        if live is None:
            return None
        live.stream.push(output)
        if output.finish_reason is None:
            return None
        self._remove(output.request_id)
        return live.request

    def reject(self, request_id: str, error: str, *, is_internal: bool = False) -> None:
        """End one stream, for a request that the worker did not take; with an error output where that is no refusal."""
        live = self._live.get(request_id)
        if live is None:
            return
        if is_internal:
            live.stream.end("error", error)
        else:
            live.stream.refuse(error)
        self._remove(request_id)

    def expire(self, request_id: str, error: str, code: ErrorCode, *, only_first: bool = False) -> bool:
        """End one stream whose time is up; whether the worker has to abort the request.

        Args:
            request_id: of the request; unknown ones are ignored.
            error: for the client.
            code: of the error.
            only_first: leave a stream alone that has had an output.
        """
        live = self._live.get(request_id)
        if live is None or live.stream.is_complete or (only_first and live.stream.has_output):
            return False
        live.stream.end("error", error, code)
        return True

    def fail(self, request_id: str, error: str) -> None:
        """End one stream with an error, for a request that the worker is told to abort; late outputs are ignored."""
        live = self._live.get(request_id)
        if live is not None:
            live.stream.end("error", error)
            self._remove(request_id)

    def abort_all(self) -> tuple[str, ...]:
        """End every stream with "abort" now; returns the ids that the worker has to abort."""
        running = {request_id: live.stream for request_id, live in self._live.items() if not live.stream.is_complete}
        for stream in running.values():
            stream.end("abort")
        return tuple(running)

    def fail_all(self, error: str) -> None:
        """End every stream with an error, for a worker that is lost."""
        for live in self._live.values():
            live.stream.end("error", error)
        self._live.clear()
        self._num_of_user.clear()
        self._idle.set()

    def lose_worker(self, error: str, *, can_run_again: Callable[[NewRequest], bool]) -> None:
        """End the streams of a lost worker with an error, but for requests that the next worker may run again.

        Those had no output yet, were not run again before, and still have a reader.
        """
        for request_id, live in tuple(self._live.items()):
            is_unseen = not (live.stream.is_complete or live.stream.has_output or live.runs_again)
            if is_unseen and can_run_again(live.request):
                live.runs_again = live.waits = True
            else:
                live.stream.end("error", error)
                self._remove(request_id)

    def take_waiting(self) -> list[NewRequest]:
        """The requests to be run again, for a new worker; those whose reader has left are dropped."""
        waiting = [live for live in self._live.values() if live.waits]
        for live in waiting:
            live.waits = False
            if live.stream.is_complete:
                self._remove(live.request.request_id)
        return [live.request for live in waiting if not live.stream.is_complete]

    async def wait_idle(self) -> None:
        """Return when no request is left."""
        await self._idle.wait()

    def _remove(self, request_id: str) -> None:
        user = self._live.pop(request_id).request.user
        self._num_of_user[user] -= 1
        if not self._num_of_user[user]:
            del self._num_of_user[user]
        if not self._live:
            self._idle.set()


@dataclass(slots=True)
class _LiveStream:
    """A stream and its request.

    Attributes:
        runs_again: whether a worker was lost with it before.
        waits: for a new worker.
    """

    request: NewRequest
    stream: RequestStream
    runs_again: bool = False
    waits: bool = False
