"""/v1/models: what is served, under which name."""

from fastapi import APIRouter

from ...http.openapi import errors
from ...served_models import LoadedModel
from ...services import ServicesDep
from .body import ModelCard, ModelList

router = APIRouter(prefix="/v1", tags=["models"])


@router.head("/models", include_in_schema=False)
@router.get("/models", responses=errors(503))
async def list_models(services: ServicesDep) -> ModelList:
    """List the served models: the base under each of its names, then the adapters, then the aliases."""
    return ModelList(data=[model_card(model) for model in await services.models.listed()])


@router.head("/models/{name:path}", include_in_schema=False)
@router.get("/models/{name:path}", responses=errors(404, 503))
async def get_model(name: str, services: ServicesDep) -> ModelCard:
    """Describe one model; its name may hold slashes."""
    return model_card(await services.models.get(name))


def model_card(model: LoadedModel) -> ModelCard:
    """A model as /v1/models describes it."""
    return ModelCard(
        id=model.name,
        created=model.created,
        root=model.root,
        parent=model.parent,
        max_model_len=model.info.max_model_len,
        block_length=model.block_length,
        domain=model.domain,
        gated_adapter=model.gated_adapter,
    )
