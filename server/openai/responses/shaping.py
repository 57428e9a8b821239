"""From a generation to the body of a response, and whether it is kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cllm_core.request import FinishReason, SamplingParams
from cllm_core.text.stream import PlacedLogprobs

from ...generation.choices import ChoiceResult, TokenCounts
from ...http.errors import ErrorDetail
from ..chat.answer import ChosenTokenLogprob
from ..chat.shaping import chosen_token
from ..shared.call import Call
from ..shared.logprobs import off_loop_if_many
from ..shared.structured import JsonObjectFormat, JsonSchemaFormat, ResponseFormat
from ..shared.tools import ChoiceMode
from .answer import (
    AllowedChoiceBody,
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    NamedChoiceBody,
    OutputTokensDetails,
    PlainFormatBody,
    ReasoningBody,
    ResponseBody,
    ResponseError,
    ResponseUsage,
    SchemaFormatBody,
    Status,
    TextBody,
    ToolBody,
)
from .items import GrowingCall, GrowingItem, GrowingReasoning, GrowingText
from .memory import Memory
from .request import ResponseRequest
from .script import ResponseScript
from .tools import ResponseAllowedChoice, ResponseNamedChoice


@dataclass(frozen=True, slots=True)
class ResponseAnswer:
    """Shapes the answer to one response request.

    Attributes:
        params: that it was decoded with.
        memory: keeps it where it is to be stored.
    """

    request: ResponseRequest
    call: Call
    params: SamplingParams
    memory: Memory

    async def whole(self, results: Sequence[ChoiceResult], counts: TokenCounts) -> ResponseBody:
        """The body of an answer that is not streamed."""
        [result] = results
        items: list[GrowingItem] = []
        if result.reasoning:
            summarizes = self.request.summarizes
            items.append(GrowingReasoning(index=0, is_summary=summarizes, text=result.reasoning))
        if result.text or not (items or result.calls):
            logprobs = await off_loop_if_many(results, lambda: self.logprobs(result.logprobs))
            text = GrowingText(index=len(items), text=result.text, logprobs=logprobs)
            items.append(text)
        items += [
            GrowingCall(index=index, name=call.name, arguments=call.arguments)
            for index, call in enumerate(result.calls, start=len(items))
        ]
        return await self.ended(items, result.finish_reason, counts)

    def script(self, _: Callable[[], TokenCounts]) -> ResponseScript:
        """The events of a streamed answer."""
        return ResponseScript(self, summarizes=self.request.summarizes)

    def logprobs(self, entries: Sequence[PlacedLogprobs]) -> list[ChosenTokenLogprob]:
        """Log-probabilities of tokens; none where the client did not ask."""
        return [chosen_token(entry, self.call.model.codec) for entry in entries]

    def begun(self) -> ResponseBody:
        """The response before anything was decoded."""
        return self._body("in_progress")

    async def ended(
        self, items: Sequence[GrowingItem], finish_reason: FinishReason, counts: TokenCounts
    ) -> ResponseBody:
        """The response as it is in the end; where it was cut, its last item was."""
        status = status_of(finish_reason)
        return await self._kept(self._body(status, items, counts, last=status))

    async def failed(self, items: Sequence[GrowingItem], error: ErrorDetail) -> ResponseBody:
        """The response as far as it came before the engine failed."""
        body = self._body("failed", items, last="incomplete")
        is_clients = error.type == "invalid_request_error"
        body.error = ResponseError(code="invalid_prompt" if is_clients else "server_error", message=error.message)
        return await self._kept(body)

    async def cancelled(self, items: Sequence[GrowingItem], counts: TokenCounts) -> ResponseBody:
        """The response as far as it came before its client left."""
        return await self._kept(self._body("cancelled", items, counts, last="incomplete"))

    async def _kept(self, body: ResponseBody) -> ResponseBody:
        if body.store:
            body.store = await self.memory.keep(body)
        return body

    def _body(
        self,
        status: Status,
        items: Sequence[GrowingItem] = (),
        counts: TokenCounts | None = None,
        *,
        last: ItemStatus = "completed",
    ) -> ResponseBody:
        request = self.request
        is_last = len(items) - 1
        return ResponseBody(
            id=self.call.id,
            created_at=self.call.created,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            error=None,
            incomplete_details=IncompleteDetails() if status == "incomplete" else None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            max_tool_calls=request.max_tool_calls,
            metadata=request.metadata or {},
            model=self.call.model.name,
            output=[item.body(last if item.index == is_last else "completed") for item in items],
            parallel_tool_calls=request.parallel_tool_calls is not False,
            previous_response_id=request.previous_response_id,
            prompt_cache_key=request.prompt_cache_key,
            prompt_cache_retention=request.prompt_cache_retention,
            reasoning=_reasoning_body(request),
            safety_identifier=request.safety_identifier,
            store=self.memory.keeps,
            temperature=self.params.temperature,
            text=TextBody(format=_format_body(request.wanted_format)),
            tool_choice=_choice_body(request.tool_choice),
            tools=_tool_bodies(request),
            top_logprobs=(request.top_logprobs or 0) if request.wants_logprobs else 0,
            top_p=self.params.top_p,
            presence_penalty=self.params.presence_penalty,
            frequency_penalty=self.params.frequency_penalty,
            usage=None if counts is None else _usage(counts),
            user=request.user,
        )


def status_of(finish_reason: FinishReason) -> ItemStatus:
    """Whether the model came to an end of its own."""
    return "incomplete" if finish_reason == "length" else "completed"


def _reasoning_body(request: ResponseRequest) -> ReasoningBody:
    options = request.reasoning
    if options is None:
        return ReasoningBody(effort=None, summary=None)
    return ReasoningBody(effort=options.effort, summary=options.summary or options.generate_summary)


def _format_body(wanted: ResponseFormat | None) -> PlainFormatBody | SchemaFormatBody:
    match wanted:
        case JsonSchemaFormat(named=named):
            return SchemaFormatBody(
                name=named.name or "",
                description=named.description,
                schema_=named.schema_ or {},
                strict=named.strict,
            )
        case JsonObjectFormat():
            return PlainFormatBody(type="json_object")
        case _:
            return PlainFormatBody(type="text")


def _tool_bodies(request: ResponseRequest) -> list[ToolBody]:
    return [
        ToolBody(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
        for tool in request.tools or ()
    ]


def _choice_body(
    choice: ChoiceMode | ResponseNamedChoice | ResponseAllowedChoice | None,
) -> ChoiceMode | NamedChoiceBody | AllowedChoiceBody:
    match choice:
        case None:
            return "auto"
        case ResponseNamedChoice():
            return NamedChoiceBody(name=choice.name)
        case ResponseAllowedChoice():
            return AllowedChoiceBody(mode=choice.mode, tools=[NamedChoiceBody(name=tool.name) for tool in choice.tools])
        case _:
            return choice


def _usage(counts: TokenCounts) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=counts.num_prompt,
        input_tokens_details=InputTokensDetails(cached_tokens=counts.num_cached),
        output_tokens=counts.num_completion,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=counts.num_reasoning),
        total_tokens=counts.num_prompt + counts.num_completion,
    )
