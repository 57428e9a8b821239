"""GET and DELETE /v1/responses/{response_id}: what is stored, for the key that stored it."""

from itertools import dropwhile
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import JSONResponse

from cllm_core.errors import InvalidRequest, UnsupportedParameter

from ...http.openapi import errors
from ...response_store import Item
from ...services import ServicesDep
from .answer import DeletedResponse, ItemList, ResponseBody
from .memory import open_store, request_owner

router = APIRouter(prefix="/v1", tags=["responses"], responses=errors(400, 404, 503))

_MAX_LISTED = 100


@router.head("/responses/{response_id}", include_in_schema=False)
@router.get("/responses/{response_id}", response_model=ResponseBody)
async def get_response(response_id: str, request: Request, services: ServicesDep, stream: bool = False) -> Response:
    """Show a stored response."""
    if stream:
        raise UnsupportedParameter("stream: a stored response comes whole; leave stream out", param="stream")
    stored = await open_store(services).get(request_owner(request, services), response_id)
    return JSONResponse(stored.body)


@router.delete("/responses/{response_id}")
async def delete_response(response_id: str, request: Request, services: ServicesDep) -> DeletedResponse:
    """Forget a stored response."""
    await open_store(services).delete(request_owner(request, services), response_id)
    return DeletedResponse(id=response_id)


@router.head("/responses/{response_id}/input_items", include_in_schema=False)
@router.get("/responses/{response_id}/input_items", response_model=ItemList)
async def list_input_items(
    response_id: str,
    request: Request,
    services: ServicesDep,
    *,
    limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """List the items of a stored response's own input, page by page, the last one first unless order says otherwise."""
    stored = await open_store(services).get(request_owner(request, services), response_id)
    items = stored.input if order == "asc" else stored.input[::-1]
    if after is not None:
        items = _behind(items, after)
    page = items[:limit]
    ids = [item["id"] for item in page]
    return JSONResponse({
        "object": "list",
        "data": page,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": len(items) > limit,
    })  # fmt: skip


def _behind(items: list[Item], item_id: str) -> list[Item]:
    found = list(dropwhile(lambda item: item["id"] != item_id, items))
    if not found:
        raise InvalidRequest(f"after={item_id!r}: the input has no such item", param="after")
    return found[1:]
