"""What a request may remember of earlier ones, and keep for later ones: the store of responses, seen by one owner."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter
from starlette.requests import Request

from cllm_core.errors import UnsupportedParameter

from ...http.errors import ResponseNotFound, StoreUnavailable
from ...http.ignored import ignore_field
from ...response_store import Item, ResponseStore, StoredResponse, owner_of
from ...services import Services
from .answer import ResponseBody
from .input_items import Input, InputItem, ItemReference, ReadableItem
from .listed_items import listed_item
from .request import ResponseRequest

_ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(Input)

_OFF = "this server stores no responses (--response-store off)"


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one request.

    Attributes:
        store: None where it is off.
        items: the whole conversation that the request answers.
        num_earlier: of them are of the responses that it continues.
        keeps: whether the answer is to be stored.
    """

    owner: str
    store: ResponseStore | None
    items: Sequence[ReadableItem]
    num_earlier: int
    keeps: bool

    async def keep(self, body: ResponseBody) -> bool:
        """Store the answer; whether that worked."""
        assert self.store is not None  # else nothing is to be kept
        response = StoredResponse(
            id=body.id,
            previous_id=body.previous_response_id,
            input=[listed_item(item).model_dump(mode="json") for item in self.items[self.num_earlier :]],
            body=body.model_dump(mode="json"),
        )
        try:
            await self.store.put(self.owner, response)
        except StoreUnavailable:
            return False  # the store has logged why; the answer is worth more than its copy
        return True


def request_owner(request: Request, services: Services) -> str:
    """Whose responses a request may see."""
    return owner_of(request.headers.get("authorization")) if services.settings.api_keys else owner_of(None)


def open_store(services: Services) -> ResponseStore:
    """The store, for requests that ask for what is in it (ResponseNotFound where it is off)."""
    if services.responses is None:
        raise ResponseNotFound(f"{_OFF}, so there is none to be found")
    return services.responses


async def recall(body: ResponseRequest, request: Request, services: Services) -> Memory:
    """What a request builds on.

    Raises:
        UnsupportedParameter: it refers to what is stored, and nothing is.
        PreviousResponseNotFound, ItemNotFound: what it refers to is not there.
        StoreUnavailable: nor can be read.
    """
    store, owner = services.responses, request_owner(request, services)
    if body.store and store is None:
        ignore_field("store", reason=_OFF)
    earlier = await _earlier(body.previous_response_id, store, owner)
    own = await _resolved(body.input, store, owner)
    return Memory(owner, store, [*earlier, *own], len(earlier), keeps=store is not None and body.store is not False)


async def _earlier(response_id: str | None, store: ResponseStore | None, owner: str) -> list[ReadableItem]:
    if response_id is None:
        return []
    if store is None:
        raise UnsupportedParameter(
            f"previous_response_id={response_id!r}: {_OFF}; send the whole conversation as input",
            param="previous_response_id",
        )
    responses = await store.conversation(owner, response_id)
    return _read(item for response in responses for item in (*response.input, *response.output))


async def _resolved(items: Sequence[InputItem], store: ResponseStore | None, owner: str) -> list[ReadableItem]:
    """The items, stored ones in place of references."""
    wanted = [item.id for item in items if isinstance(item, ItemReference)]
    if wanted and store is None:
        raise UnsupportedParameter(f"input: refers to item {wanted[0]!r}, but {_OFF}; send the item", param="input")
    stored = await store.items(owner, wanted) if wanted and store is not None else {}
    found = dict(zip(stored, _read(stored.values()), strict=True))
    return [found[item.id] if isinstance(item, ItemReference) else item for item in items]


def _read(items: Iterable[Item]) -> list[ReadableItem]:
    """Stored items, among which there are no references."""
    stored = list(items)
    read = _ITEMS.validate_python(stored) if stored else []
    return [item for item in read if not isinstance(item, ItemReference)]
