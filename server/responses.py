"""From a generation to the body and the events of /v1/responses."""

import uuid
from collections.abc import Iterable, Sequence
from typing import Literal

from sse_starlette import ServerSentEvent

from cllm_core.request import FinishReason
from server.errors import ErrorBody
from server.generation import ChoiceDelta, ChoiceResult, TokenCounts
from server.respond import sent
from server.schemas.responses import (
    ErrorEvent,
    IncompleteDetails,
    InputTokensDetails,
    ItemEvent,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    PartEvent,
    ResponseBody,
    ResponseEvent,
    ResponseRequest,
    ResponseUsage,
    StatusEvent,
    TextDeltaEvent,
    TextDoneEvent,
)

Status = Literal["in_progress", "completed", "incomplete"]


class ResponseShaper:
    """Shapes the answer to one response request.

    Args:
        created_at: Unix time in seconds.
    """

    def __init__(self, body: ResponseRequest, *, response_id: str, created_at: int) -> None:
        self._body = body
        self.response_id = response_id
        self._created_at = created_at
        self.message_id = f"msg_{uuid.uuid4().hex}"

    def whole(self, results: Sequence[ChoiceResult], counts: TokenCounts) -> ResponseBody:
        """The body of an answer that is not streamed."""
        return self.ended(results[0].text, results[0].finish_reason, counts)

    def begun(self) -> ResponseBody:
        """The response before anything was decoded."""
        return self._response("in_progress", [], None)

    def ended(self, text: str, finish_reason: FinishReason, counts: TokenCounts) -> ResponseBody:
        """The response as it is in the end."""
        status = status_of(finish_reason)
        return self._response(status, [self.message(status, [self.part(text)])], _usage(counts))

    def message(self, status: Status, content: list[OutputText]) -> OutputMessage:
        """The only output item."""
        return OutputMessage(type="message", id=self.message_id, status=status, role="assistant", content=content)

    def part(self, text: str) -> OutputText:
        """The only part of the message."""
        return OutputText(type="output_text", text=text, annotations=[], logprobs=[])

    def _response(self, status: Status, output: list[OutputMessage], usage: ResponseUsage | None) -> ResponseBody:
        body = self._body
        return ResponseBody(
            id=self.response_id,
            object="response",
            created_at=self._created_at,
            status=status,
            error=None,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=body.model,
            output=output,
            parallel_tool_calls=True,
            previous_response_id=None,
            store=False,
            temperature=1.0 if body.temperature is None else body.temperature,
            tool_choice="none",
            tools=[],
            top_p=1.0 if body.top_p is None else body.top_p,
            truncation="disabled",
            usage=usage,
        )


class ResponseScript:
    """The events of a streamed response, from response.created to response.completed or response.incomplete."""

    def __init__(self, shaper: ResponseShaper) -> None:
        self._shaper = shaper
        self._num_sent = 0
        self._text = ""
        self._finish_reason: FinishReason = "stop"

    def opening(self) -> Iterable[ServerSentEvent]:
        """The response, its message and the message's part begin."""
        shaper = self._shaper
        for kind in ("response.created", "response.in_progress"):
            yield self._sent(StatusEvent(type=kind, sequence_number=self._num_sent, response=shaper.begun()))
        yield self._item("response.output_item.added", shaper.message("in_progress", []))
        yield self._part("response.content_part.added")

    def events(self, delta: ChoiceDelta) -> Iterable[ServerSentEvent]:
        """New text, if any."""
        self._text += delta.text
        self._finish_reason = delta.finish_reason or self._finish_reason
        if delta.text:
            yield self._sent(
                TextDeltaEvent(
                    type="response.output_text.delta",
                    sequence_number=self._num_sent,
                    item_id=self._shaper.message_id,
                    output_index=0,
                    content_index=0,
                    delta=delta.text,
                    logprobs=[],
                )
            )

    def closing(self, counts: TokenCounts) -> Iterable[ServerSentEvent]:
        """Part, message and response end."""
        shaper, status = self._shaper, status_of(self._finish_reason)
        yield self._sent(
            TextDoneEvent(
                type="response.output_text.done",
                sequence_number=self._num_sent,
                item_id=shaper.message_id,
                output_index=0,
                content_index=0,
                text=self._text,
                logprobs=[],
            )
        )
        yield self._part("response.content_part.done")
        yield self._item("response.output_item.done", shaper.message(status, [shaper.part(self._text)]))
        response = shaper.ended(self._text, self._finish_reason, counts)
        yield self._sent(StatusEvent(type=f"response.{status}", sequence_number=self._num_sent, response=response))

    def failure(self, error: ErrorBody) -> ServerSentEvent:
        """The error."""
        detail = error.error
        return self._sent(
            ErrorEvent(
                type="error",
                sequence_number=self._num_sent,
                code=detail.code,
                message=detail.message,
                param=detail.param,
            )
        )

    def _item(self, kind: str, item: OutputMessage) -> ServerSentEvent:
        return self._sent(ItemEvent(type=kind, sequence_number=self._num_sent, output_index=0, item=item))

    def _part(self, kind: str) -> ServerSentEvent:
        event = PartEvent(
            type=kind,
            sequence_number=self._num_sent,
            item_id=self._shaper.message_id,
            output_index=0,
            content_index=0,
            part=self._shaper.part(self._text),
        )
        return self._sent(event)

    def _sent(self, event: ResponseEvent) -> ServerSentEvent:
        self._num_sent += 1
        return sent(event, name=event.type)


def status_of(finish_reason: FinishReason) -> Literal["completed", "incomplete"]:
    """Whether the model came to an end of its own."""
    return "incomplete" if finish_reason == "length" else "completed"


def _usage(counts: TokenCounts) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=counts.num_prompt,
        input_tokens_details=InputTokensDetails(cached_tokens=counts.num_cached),
        output_tokens=counts.num_completion,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=counts.num_prompt + counts.num_completion,
    )
