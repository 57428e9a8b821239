"""/v1/completions and /v1/chat/completions."""

import time
import uuid

from fastapi import APIRouter, Request, Response

from server.generation.generation import Generation
from server.generation.served_models import LoadedModel
from server.http.errors import ErrorBody
from server.http.json_body import JsonRoute
from server.http.openapi import errors, event_stream
from server.http.record import record_of
from server.openai.chat.body import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from server.openai.completions.body import Completion, CompletionRequest
from server.openai.shared.answers import Answer, AnswerHead, ChatAnswer, CompletionAnswer
from server.openai.shared.fields import GenerationRequest
from server.openai.shared.planning import plan_chat, plan_completion
from server.openai.shared.respond import ChunkScript, GenerationStream, respond_whole, start_generation
from server.services import ServicesDep
from server.settings import ServerSettings

GENERATION_ERRORS = errors(400, 404, 413, 415, 429, 503)

router = APIRouter(prefix="/v1", tags=["completions"], route_class=JsonRoute)


@router.post(
    "/completions",
    response_model=Completion,
    responses=GENERATION_ERRORS | event_stream(Completion, ErrorBody, ends_with_done=True),
)
async def create_completion(body: CompletionRequest, request: Request, services: ServicesDep) -> Response:
    """Continue one or more prompts."""
    model = await services.models.get(body.model)
    head = _head("cmpl", body, model, has_logprobs=body.logprobs is not None)
    plan = await plan_completion(
        body,
        model,
        answer_id=head.answer_id,
        max_choices=services.settings.max_choices,
        grammars=services.grammars,
    )
    generation = await start_generation(request, services, plan, model)
    return await _respond(request, body, generation, CompletionAnswer(head), settings=services.settings)


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses=GENERATION_ERRORS | event_stream(ChatCompletionChunk, ErrorBody, ends_with_done=True),
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, services: ServicesDep) -> Response:
    """Answer a conversation."""
    model = await services.models.get(body.model)
    head = _head("chatcmpl", body, model, has_logprobs=bool(body.logprobs))
    plan = await plan_chat(
        body,
        model,
        answer_id=head.answer_id,
        max_choices=services.settings.max_choices,
        grammars=services.grammars,
    )
    generation = await start_generation(request, services, plan, model)
    answer = ChatAnswer(head, may_call=plan.calls is not None)
    return await _respond(request, body, generation, answer, settings=services.settings)


def _head(prefix: str, body: GenerationRequest, model: LoadedModel, *, has_logprobs: bool) -> AnswerHead:
    return AnswerHead(
        answer_id=f"{prefix}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        has_logprobs=has_logprobs,
        has_decoding_stats=body.wants_decoding_stats,
        streams_usage=body.include_usage,
    )


async def _respond(
    request: Request, body: GenerationRequest, generation: Generation, answer: Answer, *, settings: ServerSettings
) -> Response:
    if not body.stream:
        return await respond_whole(request, generation, answer.whole)
    script = ChunkScript(answer, usage=body.include_usage)
    return GenerationStream(generation, script, record=record_of(request.scope), settings=settings)
