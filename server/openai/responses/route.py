"""POST /v1/responses."""

from fastapi import APIRouter, Request, Response

from ...http.json_body import JsonRoute
from ...http.openapi import GENERATION_ERRORS, event_stream
from ...services import ServicesDep
from ..chat.plan import plan_chat
from ..shared.call import begin_call, respond, start_generation
from ..shared.queueing import Turn
from .answer import ResponseBody
from .conversation import to_messages
from .events import RESPONSE_EVENTS
from .memory import recall
from .request import ResponseRequest
from .shaping import ResponseAnswer

router = APIRouter(prefix="/v1", tags=["responses"], route_class=JsonRoute)


@router.post(
    "/responses",
    response_model=ResponseBody,
    responses=GENERATION_ERRORS | event_stream(*RESPONSE_EVENTS, ends_with_done=False),
)
async def create_response(body: ResponseRequest, request: Request, services: ServicesDep) -> Response:
    """Answer a text or a conversation, and keep the answer unless the request says otherwise."""
    call = await begin_call(request, services, model=body.model, id_prefix="resp_")
    memory = await recall(body, request, services)
    messages = to_messages(memory.items, instructions=body.instructions)
    plan = await plan_chat(body.to_chat(messages), call)
    generation = await start_generation(call, plan, Turn.of(request, body, services.settings))
    answer = ResponseAnswer(body, call, plan.requests[0].params, memory)
    return await respond(call, generation, answer, is_stream=bool(body.stream))
