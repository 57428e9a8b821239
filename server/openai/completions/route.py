"""POST /v1/completions."""

from fastapi import APIRouter, Request, Response

from ...http.errors import ErrorBody
from ...http.json_body import JsonRoute
from ...http.openapi import GENERATION_ERRORS, event_stream
from ...services import ServicesDep
from ..shared.answers import answer_head
from ..shared.call import begin_call, respond, start_generation
from ..shared.queueing import Turn
from .answer import Completion
from .plan import plan_completion
from .request import CompletionRequest
from .shaping import CompletionAnswer

router = APIRouter(prefix="/v1", tags=["completions"], route_class=JsonRoute)


@router.post(
    "/completions",
    response_model=Completion,
    responses=GENERATION_ERRORS | event_stream(Completion, ErrorBody, ends_with_done=True),
)
async def create_completion(body: CompletionRequest, request: Request, services: ServicesDep) -> Response:
    """Continue one or more prompts."""
    call = await begin_call(request, services, model=body.model, id_prefix="cmpl-")
    plan = await plan_completion(body, call)
    generation = await start_generation(call, plan, Turn.of(request, body, services.settings))
    answer = CompletionAnswer(
        answer_head(call, body, has_logprobs=body.logprobs is not None),
        scores_echo=body.scores_prompt,
        scores_prompt=body.prompt_logprobs is not None,
    )
    return await respond(call, generation, answer, is_stream=bool(body.stream))
