"""The events of a streamed response, from response.created to what tells how it ended."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from cllm_core.request import FinishReason
from cllm_core.text.stream import PlacedLogprobs
from cllm_core.text.tools.reader import CallDelta

from ...generation.choices import ChoiceDelta, TokenCounts
from ...http.errors import ErrorBody, ErrorDetail
from ...http.sse import encode_event
from ..chat.answer import ChosenTokenLogprob
from .answer import ItemStatus, ResponseBody
from .events import ItemEvent, ResponseEvent, StatusEvent
from .items import GrowingCall, GrowingItem, GrowingReasoning, GrowingText


class Bodies(Protocol):
    """Shapes the bodies of one response."""

    def begun(self) -> ResponseBody:
        """Before anything was decoded."""
        ...

    async def ended(
        self, items: Sequence[GrowingItem], finish_reason: FinishReason, counts: TokenCounts
    ) -> ResponseBody:
        """In the end."""
        ...

    async def failed(self, items: Sequence[GrowingItem], error: ErrorDetail) -> ResponseBody:
        """Where the engine failed."""
        ...

    async def cancelled(self, items: Sequence[GrowingItem], counts: TokenCounts) -> ResponseBody:
        """Where the client left."""
        ...

    def logprobs(self, entries: Sequence[PlacedLogprobs]) -> list[ChosenTokenLogprob]:
        """As the items have them."""
        ...


class ResponseScript:
    """The events of one streamed response.

    Args:
        summarizes: give reasoning as a summary.
    """

    def __init__(self, bodies: Bodies, *, summarizes: bool) -> None:
        self._bodies = bodies
        self._summarizes = summarizes
        self._num_sent = 0
        self._items: list[GrowingItem] = []  # of which the last is open
        self._finish_reason: FinishReason = "stop"

    def opening(self) -> Iterable[bytes]:
        """The response begins."""
        body = self._bodies.begun()
        return self._sent(
            StatusEvent(type="response.created", response=body), StatusEvent(type="response.in_progress", response=body)
        )

    def events(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """What is new, if anything."""
        self._finish_reason = delta.finish_reason or self._finish_reason
        events: list[ResponseEvent] = []
        if delta.reasoning:
            events += self._reasoning(delta.reasoning)
        if delta.text:
            events += self._text(delta)
        for call in delta.calls:
            events += self._call(call)
        return self._sent(*events)

    async def closing(self, counts: TokenCounts) -> Iterable[bytes]:
        """The last item and the response end."""
        events: list[ResponseEvent] = []
        if not self._items:
            events += self._begin(GrowingText(index=0))
        is_cut = self._finish_reason == "length"
        events += self._end("incomplete" if is_cut else "completed")
        response = await self._bodies.ended(self._items, self._finish_reason, counts)
        last = StatusEvent(type="response.incomplete" if is_cut else "response.completed", response=response)
        return self._sent(*events, last)

    async def failure(self, error: ErrorBody) -> bytes:
        """The response has failed."""
        response = await self._bodies.failed(self._items, error.error)
        return b"".join(self._sent(StatusEvent(type="response.failed", response=response)))

    async def cut(self, counts: TokenCounts) -> None:
        """Keep what there is."""
        await self._bodies.cancelled(self._items, counts)

    def _reasoning(self, text: str) -> Iterable[ResponseEvent]:
        item = self._items[-1] if self._items else None
        if not isinstance(item, GrowingReasoning):
            item = GrowingReasoning(index=len(self._items), is_summary=self._summarizes)
            yield from self._begin(item)
        yield item.grown(text)

    def _text(self, delta: ChoiceDelta) -> Iterable[ResponseEvent]:
        item = self._items[-1] if self._items else None
        if not isinstance(item, GrowingText):
            item = GrowingText(index=len(self._items))
            yield from self._begin(item)
        yield item.grown(delta.text, self._bodies.logprobs(delta.logprobs))

    def _call(self, delta: CallDelta) -> Iterable[ResponseEvent]:
        if delta.name is not None:
            yield from self._begin(GrowingCall(index=len(self._items), name=delta.name))
        if delta.arguments:
            item = self._items[-1]
            assert isinstance(item, GrowingCall)  # its name came first
            yield item.grown(delta.arguments)

    def _begin(self, item: GrowingItem) -> Iterable[ResponseEvent]:
        if self._items:
            yield from self._end("completed")
        self._items.append(item)
        yield ItemEvent(type="response.output_item.added", output_index=item.index, item=item.body("in_progress"))
        yield from item.begun()

    def _end(self, status: ItemStatus) -> Iterable[ResponseEvent]:
        item = self._items[-1]
        yield from item.ended()
        yield ItemEvent(type="response.output_item.done", output_index=item.index, item=item.body(status))

    def _sent(self, *events: ResponseEvent) -> list[bytes]:
        """The events encoded and numbered."""
        encoded: list[bytes] = []
        for event in events:
            event.sequence_number = self._num_sent
            self._num_sent += 1
            encoded.append(encode_event(event.model_dump_json().encode(), name=event.type))
        return encoded
