"""What routes need, injected: built once by the app factory, handed out by FastAPI dependencies."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

from fastapi import Depends, Request

from cllm_core.worker.engine_client import EngineClient

from .generation.grammar_checker import GrammarChecker
from .ops.metrics import Metrics
from .ops.tracing import Tracer
from .response_store import ResponseStore
from .served_models import ModelRegistry
from .settings import ServerSettings


@dataclass(slots=True)
class Shutdown:
    """Whether the server is about to exit: /ready is 503 then, while requests may still be taken."""

    has_begun: bool = False


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of one app.

    Attributes:
        responses: stored for clients, None where none are.
        tracer: of requests, None where they are not traced.
    """

    engine: EngineClient
    settings: ServerSettings
    models: ModelRegistry
    metrics: Metrics
    grammars: GrammarChecker
    responses: ResponseStore | None
    tracer: Tracer | None = None
    shutdown: Shutdown = field(default_factory=Shutdown)


def build_services(engine: EngineClient, settings: ServerSettings) -> Services:
    """The parts of an app that serves this engine."""
    models = ModelRegistry(engine, settings)
    metrics = Metrics(engine, models)
    grammars = GrammarChecker(max_seconds=settings.max_grammar_seconds, observe=metrics.observe_grammar)
    tracer = None if settings.otlp_endpoint is None else Tracer(settings.otlp_endpoint)
    return Services(engine, settings, models, metrics, grammars, _response_store(settings), tracer)


def _response_store(settings: ServerSettings) -> ResponseStore | None:
    if settings.response_store == "off":
        return None
    path = None if settings.response_store == "memory" else Path(settings.response_store).expanduser()
    return ResponseStore(path, max_responses=settings.response_store_size, max_days=settings.response_store_days)


def services_of(request: Request) -> Services:
    """The services of the app that handles the request."""
    return cast(Services, request.app.state.services)


async def _injected(request: Request) -> Services:
    """For FastAPI, which would call a plain function in a thread of its own."""
    return services_of(request)


ServicesDep = Annotated[Services, Depends(_injected)]
