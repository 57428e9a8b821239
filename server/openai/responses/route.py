"""/v1/responses: text only, nothing stored."""

import time
import uuid

from fastapi import APIRouter, Request, Response

from server.http.json_body import JsonRoute
from server.http.openapi import GENERATION_ERRORS, event_stream
from server.http.record import record_of
from server.openai.chat.plan import plan_chat
from server.openai.responses.answer import ResponseBody
from server.openai.responses.events import RESPONSE_EVENTS
from server.openai.responses.request import ResponseRequest
from server.openai.responses.shaping import ResponseScript, ResponseShaper
from server.openai.shared.respond import respond_whole, start_generation
from server.openai.shared.streaming import GenerationStream
from server.services import ServicesDep

router = APIRouter(prefix="/v1", tags=["responses"], route_class=JsonRoute)


@router.post(
    "/responses",
    response_model=ResponseBody,
    responses=GENERATION_ERRORS | event_stream(*RESPONSE_EVENTS, ends_with_done=False),
)
async def create_response(body: ResponseRequest, request: Request, services: ServicesDep) -> Response:
    """Answer a text or a conversation."""
    model = await services.models.get(body.model)
    shaper = ResponseShaper(body, response_id=f"resp_{uuid.uuid4().hex}", created_at=int(time.time()))
    chat = body.to_chat()
    plan = await plan_chat(
        chat,
        model,
        answer_id=shaper.response_id,
        max_choices=services.settings.max_choices,
        grammars=services.grammars,
    )
    generation = await start_generation(request, services, plan, model)
    if not body.stream:
        return await respond_whole(request, generation, shaper.whole)
    script = ResponseScript(shaper)
    return GenerationStream(generation, script, record=record_of(request.scope), settings=services.settings)
