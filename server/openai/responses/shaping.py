"""From a generation to the body and the events of /v1/responses."""

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from cllm_core.request import FinishReason
from cllm_core.text.tools.reader import CallDelta
from server.generation.choices import ChoiceDelta, ChoiceResult, TokenCounts
from server.http.errors import ErrorBody
from server.http.sse import encode_event
from server.openai.responses.answer import (
    AllowedChoiceBody,
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    NamedChoiceBody,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponseBody,
    ResponseUsage,
    ToolBody,
)
from server.openai.responses.events import (
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ErrorEvent,
    ItemEvent,
    PartEvent,
    ResponseEvent,
    StatusEvent,
    TextDeltaEvent,
    TextDoneEvent,
)
from server.openai.responses.request import ResponseAllowedChoice, ResponseNamedChoice, ResponseRequest, ResponseTool
from server.openai.shared.answers import new_call_id
from server.openai.shared.call import Call
from server.openai.shared.text_frames import as_json
from server.openai.shared.tools import ChoiceMode

Status = Literal["in_progress", "completed", "incomplete"]


class InItem(TypedDict):
    """Fields of every event about an item."""

    sequence_number: int
    item_id: str
    output_index: int


@dataclass(slots=True)
class TextItem:
    """The text of an answer while it grows."""

    text: str = ""
    item_id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")

    def body(self, status: Status) -> OutputMessage:
        """The item, with its only part unless it has just begun."""
        content = [] if status == "in_progress" else [self.part()]
        return OutputMessage(type="message", id=self.item_id, status=status, role="assistant", content=content)

    def part(self) -> OutputText:
        """The text."""
        return OutputText(type="output_text", text=self.text, annotations=[], logprobs=[])


@dataclass(slots=True)
class CallItem:
    """A call of a function while it grows."""

    name: str
    arguments: str = ""
    item_id: str = field(default_factory=lambda: f"fc_{uuid.uuid4().hex}")
    call_id: str = field(default_factory=new_call_id)

    def body(self, status: Status) -> FunctionCallItem:
        """The item."""
        return FunctionCallItem(
            type="function_call",
            id=self.item_id,
            call_id=self.call_id,
            name=self.name,
            arguments=self.arguments,
            status=status,
        )


AnswerItem = TextItem | CallItem


class ResponseShaper:
    """Shapes the answer to one response request."""

    def __init__(self, body: ResponseRequest, call: Call) -> None:
        self._body = body
        self._call = call

    def whole(self, results: Sequence[ChoiceResult], counts: TokenCounts) -> ResponseBody:
        """The body of an answer that is not streamed."""
        result = results[0]
        items: list[AnswerItem] = [CallItem(call.name, call.arguments) for call in result.calls]
        if result.text or not items:
            items.insert(0, TextItem(result.text))
        return self.ended(items, result.finish_reason, counts)

    def script(self, _: Callable[[], TokenCounts]) -> "ResponseScript":
        """The events of a streamed answer."""
        return ResponseScript(self)

    def begun(self) -> ResponseBody:
        """The response before anything was decoded."""
        return self._response("in_progress", [], None)

    def ended(self, items: Sequence[AnswerItem], finish_reason: FinishReason, counts: TokenCounts) -> ResponseBody:
        """The response as it is in the end; where it was cut, its last item was."""
        status = status_of(finish_reason)
        *whole, last = items
        output = [*(item.body("completed") for item in whole), last.body(status)]
        return self._response(status, output, _usage(counts))

    def _response(self, status: Status, output: list[OutputItem], usage: ResponseUsage | None) -> ResponseBody:
        body = self._body
        return ResponseBody(
            id=self._call.id,
            object="response",
            created_at=self._call.created,
            status=status,
            error=None,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=self._call.model.name,
            output=output,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=None,
            store=False,
            temperature=1.0 if body.temperature is None else body.temperature,
            tool_choice=_choice_body(body.tool_choice),
            tools=[_tool_body(tool) for tool in body.tools or ()],
            top_p=1.0 if body.top_p is None else body.top_p,
            truncation="disabled",
            usage=usage,
        )


class ResponseScript:
    """The events of a streamed response, from response.created to response.completed or response.incomplete."""

    def __init__(self, shaper: ResponseShaper) -> None:
        self._shaper = shaper
        self._num_sent = 0
        self._items: list[AnswerItem] = []  # of which the last is open
        self._finish_reason: FinishReason = "stop"

    def opening(self) -> Iterable[bytes]:
        """The response begins."""
        for kind in ("response.created", "response.in_progress"):
            yield self._sent(StatusEvent(type=kind, sequence_number=self._num_sent, response=self._shaper.begun()))

    def events(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """New text and calls, if any."""
        self._finish_reason = delta.finish_reason or self._finish_reason
        if delta.text:
            yield from self._text(delta.text)
        for call in delta.calls:
            yield from self._call(call)

    def closing(self, counts: TokenCounts) -> Iterable[bytes]:
        """The last item and the response end."""
        if not self._items:
            yield from self._begin(TextItem())
        status = status_of(self._finish_reason)
        yield from self._end(self._items[-1], status)
        response = self._shaper.ended(self._items, self._finish_reason, counts)
        yield self._sent(StatusEvent(type=f"response.{status}", sequence_number=self._num_sent, response=response))

    def _text(self, text: str) -> Iterable[bytes]:
        if not self._items:
            yield from self._begin(TextItem())
        item = self._items[-1]
        assert isinstance(item, TextItem)  # text comes before every call
        item.text += text
        yield self._sent(
            TextDeltaEvent(
                type="response.output_text.delta", **self._in_item(item), content_index=0, delta=text, logprobs=[]
            )
        )

    def _call(self, delta: CallDelta) -> Iterable[bytes]:
        if delta.name is not None:
            if self._items:
                yield from self._end(self._items[-1], "completed")
            yield from self._begin(CallItem(delta.name))
        if delta.arguments:
            item = self._items[-1]
            assert isinstance(item, CallItem)  # its name came first
            item.arguments += delta.arguments
            kind = "response.function_call_arguments.delta"
            yield self._sent(ArgumentsDeltaEvent(type=kind, **self._in_item(item), delta=delta.arguments))

    def _begin(self, item: AnswerItem) -> Iterable[bytes]:
        self._items.append(item)
        yield self._item("response.output_item.added", item.body("in_progress"))
        if isinstance(item, TextItem):
            yield self._part("response.content_part.added", item)

    def _end(self, item: AnswerItem, status: Status) -> Iterable[bytes]:
        match item:
            case TextItem():
                kind = "response.output_text.done"
                yield self._sent(
                    TextDoneEvent(type=kind, **self._in_item(item), content_index=0, text=item.text, logprobs=[])
                )
                yield self._part("response.content_part.done", item)
            case CallItem():
                kind = "response.function_call_arguments.done"
                yield self._sent(ArgumentsDoneEvent(type=kind, **self._in_item(item), arguments=item.arguments))
        yield self._item("response.output_item.done", item.body(status))

    def _in_item(self, item: AnswerItem) -> InItem:
        return {
            "sequence_number": self._num_sent,
            "item_id": item.item_id,
            "output_index": len(self._items) - 1,
        }

    def failure(self, error: ErrorBody) -> bytes:
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

    def _item(self, kind: str, body: OutputItem) -> bytes:
        output_index = len(self._items) - 1
        return self._sent(ItemEvent(type=kind, sequence_number=self._num_sent, output_index=output_index, item=body))

    def _part(self, kind: str, item: TextItem) -> bytes:
        return self._sent(PartEvent(type=kind, **self._in_item(item), content_index=0, part=item.part()))

    def _sent(self, event: ResponseEvent) -> bytes:
        self._num_sent += 1
        return encode_event(as_json(event), name=event.type)


def status_of(finish_reason: FinishReason) -> Literal["completed", "incomplete"]:
    """Whether the model came to an end of its own."""
    return "incomplete" if finish_reason == "length" else "completed"


def _tool_body(tool: ResponseTool) -> ToolBody:
    return ToolBody(
        type="function",
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )


def _choice_body(
    choice: ChoiceMode | ResponseNamedChoice | ResponseAllowedChoice | None,
) -> ChoiceMode | NamedChoiceBody | AllowedChoiceBody:
    match choice:
        case None:
            return "auto"
        case ResponseNamedChoice():
            return NamedChoiceBody(type="function", name=choice.name)
        case ResponseAllowedChoice():
            tools = [NamedChoiceBody(type="function", name=tool.name) for tool in choice.tools]
            return AllowedChoiceBody(type="allowed_tools", mode=choice.mode, tools=tools)
        case _:
            return choice


def _usage(counts: TokenCounts) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=counts.num_prompt,
        input_tokens_details=InputTokensDetails(cached_tokens=counts.num_cached, cache_write_tokens=0),
        output_tokens=counts.num_completion,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=counts.num_prompt + counts.num_completion,
    )
