"""For those who run the server: /health, /ready, /metrics and the like. They stay open where API keys are required."""

from typing import Literal

import msgspec
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import JSONResponse

from cllm_core import __version__
from cllm_core.worker.engine_client import EngineState, EngineStatus

from ..services import ServicesDep

router = APIRouter(tags=["operations"])


class StatusBody(BaseModel):
    """State of the engine.

    Attributes:
        progress: of loading, 0..1.
    """

    status: Literal["ok", "failed"]
    engine: EngineState
    detail: str
    progress: float
    num_restarts: int


class VersionBody(BaseModel):
    """Version of the server."""

    version: str


@router.head("/ping", include_in_schema=False)
@router.post("/ping", include_in_schema=False)
@router.get("/ping", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=StatusBody, responses={503: {"model": StatusBody}})
async def health(services: ServicesDep) -> Response:
    """Tell whether the process is of use: 200 also while a worker loads or restarts, 503 when it needs a person."""
    status = services.engine.status
    return _answer(status, is_good=status.state != "failed")


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_model=StatusBody, responses={503: {"model": StatusBody}})
async def ready(services: ServicesDep) -> Response:
    """Tell whether requests are taken now."""
    status = services.engine.status
    if services.shutdown.has_begun and status.state == "ready":
        status = msgspec.structs.replace(status, state="draining", detail="the server is shutting down")
    return _answer(status, is_good=status.state == "ready")


@router.head("/version", include_in_schema=False)
@router.get("/version")
async def version() -> VersionBody:
    """Tell the version of the server."""
    return VersionBody(version=__version__)


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(services: ServicesDep) -> Response:
    """Metrics in the Prometheus text format."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _answer(status: EngineStatus, *, is_good: bool) -> Response:
    body = StatusBody(
        status="failed" if status.state == "failed" else "ok",
        engine=status.state,
        detail=status.detail,
        progress=status.progress,
        num_restarts=status.num_restarts,
    )
    return JSONResponse(body.model_dump(), 200 if is_good else 503)
