"""How a generation reaches its client, as one JSON body or as server-sent events, and ends when the client leaves."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.generation.choices import ChoiceResult, TokenCounts
from server.generation.generation import Generation
from server.generation.plan import GenerationPlan
from server.generation.served_models import LoadedModel
from server.http.errors import ClientDisconnected
from server.http.record import record_of
from server.openai.shared.answers import Answer, ChunkScript
from server.openai.shared.sampling import GenerationRequest
from server.openai.shared.streaming import GenerationStream
from server.services import Services
from server.settings import ServerSettings

T = TypeVar("T")


async def start_generation(
    request: Request, services: Services, plan: GenerationPlan, model: LoadedModel
) -> Generation:
    """Begin to decode what the plan asks for; whoever calls must close the generation, which responding does."""
    record = record_of(request.scope)
    record.model = model.adapter_name or services.models.name_or_empty
    generation = Generation(services.engine, model.codec, plan, record=record, metrics=services.metrics)
    await generation.start()
    return generation


async def respond_whole(
    request: Request, generation: Generation, shape: Callable[[Sequence[ChoiceResult], TokenCounts], BaseModel]
) -> Response:
    """Wait for every choice and answer in one body; closes the generation, at once when the client leaves.

    Raises:
        ClientDisconnected: nobody waits for the answer any more.
        EngineFailed, EngineUnavailable: as Generation.deltas.
    """
    try:
        results = await _until_disconnect(request, generation.results())
    except ClientDisconnected:
        record_of(request.scope).is_aborted = True
        raise
    finally:
        await generation.aclose()
    body = shape(results, generation.counts)
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")


async def _until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless the client leaves first: then `work` is cancelled (ClientDisconnected)."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnected("the client closed the connection before its answer was complete")
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def respond(
    request: Request, body: GenerationRequest, generation: Generation, answer: Answer, *, settings: ServerSettings
) -> Response:
    """Answer in one body, or as a stream where the client asked for one; closes the generation."""
    if not body.stream:
        return await respond_whole(request, generation, answer.whole)
    script = ChunkScript(answer, usage=body.include_usage)
    return GenerationStream(generation, script, record=record_of(request.scope), settings=settings)
