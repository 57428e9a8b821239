"""ServedAdapters: which adapters requests may name, and which are kept until the last request that runs with them ends.

Knows neither tensors nor files: an AdapterSource reads and holds the weights.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cllm_core.config import check_adapter_name
from cllm_core.errors import InvalidRequest, ModelLoadError
from cllm_core.info import AdapterInfo


class AdapterSource(Protocol):
    """Holds adapters by id (AdapterStore)."""

    def load(self, adapter_id: int, *, name: str, path: str, folder: Path) -> AdapterInfo:
        """Read an adapter and hold it under an unused id above 0; ModelLoadError where that cannot be."""
        ...

    def drop(self, adapter_id: int) -> None:
        """Give an adapter's memory back; no-op where the id is not held."""
        ...


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter that requests may name; its id is never used again."""

    adapter_id: int
    info: AdapterInfo

    @property
    def cache_key(self) -> str:
        """Requests share cached prefixes only where this is equal."""
        return f"{self.info.name}@{self.info.revision}"


class ServedAdapters:
    """The adapters of one engine.

    Args:
        source: holds their weights.
        max_adapters: held at once.
    """

    def __init__(self, source: AdapterSource, *, max_adapters: int) -> None:
        self._source = source
        self._max_adapters = max_adapters
        self._by_name: dict[str, ServedAdapter] = {}
        self._held: dict[int, str] = {}  # names by id, also of those unloaded but for the requests that run
        self._next_id = itertools.count(1)

    @property
    def infos(self) -> tuple[AdapterInfo, ...]:
        """Those that requests may name, in the order they were loaded."""
        return tuple(adapter.info for adapter in self._by_name.values())

    def get(self, name: str) -> ServedAdapter:
        """The adapter of this name (InvalidRequest where none is served under it)."""
        adapter = self._by_name.get(name)
        if adapter is None:
            raise InvalidRequest(
                f"adapter {name!r} is not loaded; loaded are: {', '.join(self._by_name) or 'none'}", param="model"
            )
        return adapter

    def load(self, name: str, path: str, folder: Path) -> None:
        """Serve the adapter in `folder`, which the user called `path`.

        Raises:
            ConfigError: the name is malformed.
            ModelLoadError: the name is taken, there is no room, or the adapter cannot be used.
        """
        check_adapter_name(name)
        if name in self._by_name:
            raise ModelLoadError(f"adapter {name!r} is loaded already; unload it first, or choose another name")
        if len(self._held) >= self._max_adapters:
            raise ModelLoadError(
                f"{len(self._held)} adapters are held and max_adapters allows no more; unload one, or raise that"
            )
        adapter_id = next(self._next_id)
        try:
            info = self._source.load(adapter_id, name=name, path=path, folder=folder)
        except BaseException:
            self._source.drop(adapter_id)
            raise
        self._by_name[name] = ServedAdapter(adapter_id, info)
        self._held[adapter_id] = name

    def unload(self, name: str) -> None:
        """Take no more requests for it (InvalidRequest where unknown); `drop_unused` frees it."""
        self.get(name)
        del self._by_name[name]

    @property
    def has_leaving(self) -> bool:
        """Whether unloaded adapters are held still, for requests that run with them."""
        return len(self._held) > len(self._by_name)

    def drop_unused(self, used_ids: Collection[int]) -> None:
        """Free the unloaded adapters that no request runs with any more."""
        kept = {adapter.adapter_id for adapter in self._by_name.values()}.union(used_ids)
        for adapter_id in self._held.keys() - kept:
            self._source.drop(adapter_id)
            del self._held[adapter_id]

    def name_of(self, adapter_id: int) -> str:
        """Name of an adapter that is held; "" of id 0."""
        return self._held[adapter_id] if adapter_id else ""
