"""Tells the log how the engine fares: loading progress, what was loaded, restarts, failure."""

import asyncio

import structlog

from cllm_core.errors import CllmError
from cllm_core.info import ModelInfo
from cllm_core.worker.engine_client import EngineClient, EngineStatus

from ..served_models import ModelRegistry

_POLL_SECONDS = 0.2
_PROGRESS_STEP = 0.1  # of loading, 0..1: finer steps would flood the log

_log = structlog.stdlib.get_logger(__name__)


async def watch_engine(engine: EngineClient, models: ModelRegistry) -> None:
    """Log every change of the engine's status and build the tokenizer once a model is ready; runs until cancelled."""
    logged: EngineStatus | None = None
    while True:
        status = engine.status
        if logged is None or _differs(logged, status):
            logged = status
            await _log_status(status, engine, models)
        await asyncio.sleep(_POLL_SECONDS)


def _differs(logged: EngineStatus, status: EngineStatus) -> bool:
    return (
        status.state != logged.state
        or status.detail != logged.detail
        or status.num_restarts != logged.num_restarts
        or status.progress - logged.progress >= _PROGRESS_STEP
    )


async def _log_status(status: EngineStatus, engine: EngineClient, models: ModelRegistry) -> None:
    match status.state:
        case "starting":
            _log.info("loading", stage=status.detail, progress=f"{status.progress:.0%}")
        case "ready":
            await _prepare(engine, models)
        case "restarting":
            _log.warning("worker restarting", reason=status.detail, restarts=status.num_restarts)
        case "failed":
            pass  # logged by the client, which knows it first
        case "draining" | "stopped":
            _log.info("engine " + status.state)


async def _prepare(engine: EngineClient, models: ModelRegistry) -> None:
    try:
        model = await models.current()
    except CllmError as error:
        _log.error("the model's tokenizer or chat template cannot be used", reason=str(error))
        return
    _log.info("ready", served_as=model.name, **_facts(engine.info))


def _facts(info: ModelInfo) -> dict[str, object]:
    return {
        "model": info.name,
        "architecture": info.architecture,
        "parameters": f"{info.num_parameters / 1e6:.0f}M",
        "device": info.device,
        "dtype": info.number_format,
        "weights_gib": round(info.weight_bytes / 2**30, 2),
        "cache_gib": round(info.cache_bytes / 2**30, 2),
        "cache_tokens": info.num_cache_blocks * info.cache_block_size,
        "max_model_len": info.max_model_len,
        "max_num_seqs": info.max_num_seqs,
        "block_length": info.block_length,
        "domain": info.domain,
        "adapters": [adapter.name for adapter in info.adapters],
    }
