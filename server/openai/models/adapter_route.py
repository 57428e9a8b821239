"""/v1/load_lora_adapter and /v1/unload_lora_adapter, by vLLM's names: change what is served; off unless asked for.

Whoever may call them decides which of the folders below --adapter-root are read: for trusted networks.
"""

import structlog
from fastapi import APIRouter

from cllm_core.config import check_adapter_name
from cllm_core.errors import ConfigError, InvalidRequest

from ...http.json_body import JsonRoute
from ...http.openapi import errors
from ...services import ServicesDep
from .body import LoadAdapterRequest, ModelCard, UnloadAdapterRequest, UnloadedAdapter
from .route import model_card

_log = structlog.stdlib.get_logger(__name__)

router = APIRouter(prefix="/v1", tags=["adapters"], route_class=JsonRoute, responses=errors(400, 404, 413, 415, 503))


@router.post("/load_lora_adapter")
async def load_lora_adapter(body: LoadAdapterRequest, services: ServicesDep) -> ModelCard:
    """Serve a LoRA adapter as a model of its own, until it is unloaded."""
    _check_name(body.lora_name)
    if body.lora_name in {model.name for model in await services.models.all()}:
        raise InvalidRequest(f"lora_name: {body.lora_name!r} is already served; unload it first", param="lora_name")
    await services.engine.load_adapter(body.lora_name, body.lora_path)
    _log.info("adapter loaded", model=body.lora_name, path=body.lora_path)
    return model_card(await services.models.find(body.lora_name, param="lora_name"))


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadAdapterRequest, services: ServicesDep) -> UnloadedAdapter:
    """Take no more requests for an adapter; those that run finish with it."""
    model = await services.models.find(body.lora_name, param="lora_name")
    if model.adapter is None:
        raise InvalidRequest(
            f"lora_name: {body.lora_name!r} is the base model, which cannot be unloaded", param="lora_name"
        )
    await services.engine.unload_adapter(body.lora_name)
    _log.info("adapter unloaded", model=body.lora_name)
    return UnloadedAdapter(id=body.lora_name)


def _check_name(name: str) -> None:
    try:
        check_adapter_name(name)
    except ConfigError as error:
        raise InvalidRequest(f"lora_name: {error}", param="lora_name") from error
