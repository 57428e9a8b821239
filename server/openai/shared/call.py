"""One call of an endpoint that generates: plan, start, answer, in this order and for all of them alike.

A route parses its body, makes a Call, plans what the engine is asked, starts it and responds. This module knows no
endpoint: plans and answers are handed in.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from cllm_core.errors import InvalidRequest

from ...generation.choices import ChoiceResult, TokenCounts
from ...generation.generation import Generation
from ...generation.plan import GenerationPlan
from ...http.disconnect import until_disconnect
from ...http.errors import ClientDisconnected
from ...http.record import RequestRecord, record_of
from ...served_models import LoadedModel
from ...services import Services
from .queueing import Turn
from .streaming import GenerationStream, Script


@dataclass(frozen=True, slots=True)
class Call:
    """What plan, generation and answer of one call have in common.

    Attributes:
        id: of the answer, unique; those of the engine's requests are made from it.
        created: Unix time in seconds.
        model: that answers.
    """

    request: Request
    services: Services
    model: LoadedModel
    id: str
    created: int

    @property
    def record(self) -> RequestRecord:
        """For the access log."""
        return record_of(self.request.scope)


class Answer(Protocol):
    """Shapes the answer to one call: as one body, or as the events of a stream."""

    async def whole(self, results: Sequence[ChoiceResult], counts: TokenCounts) -> BaseModel:
        """The body of an answer that is not streamed."""
        ...

    def script(self, counts: Callable[[], TokenCounts]) -> Script:
        """The events of a streamed answer; `counts` tells the tokens so far."""
        ...


async def begin_call(request: Request, services: Services, *, model: str | None, id_prefix: str) -> Call:
    """A new call to the model of that name, to the base where there is none (ModelNotFound, EngineUnavailable)."""
    loaded = await services.models.get(model)
    return Call(request, services, loaded, id=f"{id_prefix}{uuid.uuid4().hex}", created=int(time.time()))


async def start_generation(call: Call, plan: GenerationPlan, turn: Turn) -> Generation:
    """Begin to decode what the plan asks for; whoever calls must close the generation, which `respond` does.

    Raises:
        InvalidRequest: it asks for more outputs than the queue could ever hold for this user.
        EngineBusy: than it holds now.
    """
    services, model = call.services, call.model
    most = services.engine.max_requests(turn.user)
    if len(plan.requests) > most:
        raise InvalidRequest(
            f"n: {len(plan.requests)} outputs were requested (prompts times n or best_of); this server runs and queues "
            f"at most {most} at a time for one user: lower n or send fewer prompts",
            param="n",
        )
    plan = replace(plan, requests=turn.stamp(plan.requests))
    call.record.model = model.adapter_name or services.models.name_or_empty
    generation = Generation(services.engine, model.codec, plan, record=call.record, metrics=services.metrics)
    await generation.start()
    return generation


async def respond(call: Call, generation: Generation, answer: Answer, *, is_stream: bool) -> Response:
    """Send the answer in one body or as a stream, and close the generation, at once when the client leaves.

    Raises:
        ClientDisconnected: nobody waits for the answer any more.
        EngineFailed, EngineUnavailable: as Generation.deltas; in a stream they become an error event.
    """
    if is_stream:
        return GenerationStream(
            generation, answer.script(lambda: generation.counts), record=call.record, settings=call.services.settings
        )
    try:
        results = await until_disconnect(call.request, generation.results())
    except ClientDisconnected:
        call.record.is_aborted = True
        raise
    finally:
        await generation.aclose()
    body = await answer.whole(results, generation.counts)
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")
