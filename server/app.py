"""The FastAPI app: factory, lifespan and error handlers. All it works with is handed in."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from cllm_core import __version__
from cllm_core.errors import CllmError
from cllm_core.worker.engine_client import EngineClient

from .http.errors import STATUS_CODES, answer_error, http_exception_response
from .http.ignored import IGNORED_FIELDS_HEADER
from .http.middleware import (
    REQUEST_ID_HEADER,
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    RequestContextMiddleware,
    TrailingSlashMiddleware,
)
from .http.openapi import DocumentedApi
from .http.record import record_of
from .http.validation import request_error_of
from .openai.chat import route as chat
from .openai.chat.answer import ChatCompletionChunk
from .openai.completions import route as completions
from .openai.completions.answer import Completion
from .openai.models import adapter_route as adapters
from .openai.models import route as models
from .openai.responses import route as responses
from .openai.responses import stored_route as stored_responses
from .openai.responses.events import RESPONSE_EVENTS
from .openai.tokens import route as tokens
from .ops import routes as operations
from .ops.engine_log import watch_engine
from .ops.loop_lag import watch_loop
from .playground import routes as playground
from .services import Services, build_services
from .settings import ServerSettings


def create_app(engine: EngineClient, settings: ServerSettings) -> FastAPI:
    """An app that serves this engine; it starts the engine when it starts up and stops it when it shuts down."""
    services = build_services(engine, settings)
    engine.add_step_listener(services.metrics.observe_step)
    app = DocumentedApi(
        events=(Completion, ChatCompletionChunk, *RESPONSE_EVENTS),
        title="CLLM server",
        version=__version__,
        summary="OpenAI-compatible inference for Consistency LLMs: Jacobi decoding",
        lifespan=_lifespan(services),
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.services = services
    app.state.body_limits = settings.body_limits
    _add_routes(app, settings)
    _add_error_handlers(app)
    _add_middleware(app, services)
    return app


def _add_routes(app: FastAPI, settings: ServerSettings) -> None:
    # The middleware checks the keys, before the body is read; here the scheme is only declared for the schema.
    with_key = [Security(HTTPBearer(auto_error=False))]
    # Tried one after the other with each request: those that most requests want stand first, in no router of routers.
    app.include_router(chat.router, dependencies=with_key)
    app.include_router(completions.router, dependencies=with_key)
    app.include_router(responses.router, dependencies=with_key)
    app.include_router(models.router, dependencies=with_key)
    app.include_router(tokens.router, dependencies=with_key)
    app.include_router(stored_responses.router, dependencies=with_key)
    if settings.adapter_root is not None:
        app.include_router(adapters.router, dependencies=with_key)
    app.include_router(operations.router)
    if settings.playground:
        app.include_router(playground.router)


def _lifespan(services: Services) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        engine = services.engine
        await engine.start()
        if services.responses is not None:
            await services.responses.open()
        watchers = [
            asyncio.create_task(watch_engine(engine, services.models)),
            asyncio.create_task(watch_loop(services.metrics.observe_loop_lag)),
        ]
        try:
            yield
        finally:
            for watcher in watchers:
                watcher.cancel()
            # DrainingServer has drained, and a second time would wait in vain for a worker that hangs.
            if engine.status.state != "draining":
                await engine.drain(services.settings.drain_seconds)
            await engine.stop()
            if services.responses is not None:
                await services.responses.close()
            if services.tracer is not None:
                await asyncio.to_thread(services.tracer.close)

    return lifespan


def _add_middleware(app: FastAPI, services: Services) -> None:
    """Innermost first."""
    settings = services.settings
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes)
    if settings.api_keys or settings.admin_keys:
        app.add_middleware(ApiKeyMiddleware, api_keys=settings.api_keys, admin_keys=settings.admin_keys)
    app.add_middleware(
        RequestContextMiddleware,
        observe=services.metrics.observe_http,
        unknown_fields=settings.unknown_fields,
        trace=services.tracer,
    )
    if settings.allowed_origins or settings.allowed_origin_regex:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_origin_regex=settings.allowed_origin_regex,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=[REQUEST_ID_HEADER, IGNORED_FIELDS_HEADER, "Retry-After"],
        )
    app.add_middleware(TrailingSlashMiddleware)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(CllmError)
    async def on_cllm_error(request: Request, error: CllmError) -> Response:
        return answer_error(error, record_of(request.scope))

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: Request, error: RequestValidationError) -> Response:
        return answer_error(request_error_of(error), record_of(request.scope))

    @app.exception_handler(HTTPException)
    async def on_refused_route(request: Request, error: HTTPException) -> Response:
        record_of(request.scope).error = STATUS_CODES.get(error.status_code)
        return http_exception_response(error, request)
