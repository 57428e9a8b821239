"""POST /v1/chat/completions."""

from fastapi import APIRouter, Request, Response

from ...http.errors import ErrorBody
from ...http.json_body import JsonRoute
from ...http.openapi import GENERATION_ERRORS, event_stream
from ...services import ServicesDep
from ..shared.answers import answer_head
from ..shared.call import begin_call, respond, start_generation
from ..shared.queueing import Turn
from .answer import ChatCompletion, ChatCompletionChunk
from .plan import plan_chat
from .request import ChatCompletionRequest
from .shaping import ChatAnswer

router = APIRouter(prefix="/v1", tags=["chat completions"], route_class=JsonRoute)


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses=GENERATION_ERRORS | event_stream(ChatCompletionChunk, ErrorBody, ends_with_done=True),
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, services: ServicesDep) -> Response:
    """Answer a conversation."""
    call = await begin_call(request, services, model=body.model, id_prefix="chatcmpl-")
    plan = await plan_chat(body, call)
    generation = await start_generation(call, plan, Turn.of(request, body, services.settings))
    answer = ChatAnswer(
        answer_head(call, body, has_logprobs=bool(body.logprobs)),
        may_call=plan.syntax is not None and plan.syntax.may_call,
        calls_by_functions=body.calls_by_functions,
    )
    return await respond(call, generation, answer, is_stream=bool(body.stream))
