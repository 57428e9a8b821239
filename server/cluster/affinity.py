"""Which replica answers a request: the one that answered the beginning of its conversation, as long as it keeps up.

Rendezvous hashing (Thaler and Ravishankar, 1998): each replica gets a score from the hash of the conversation and its
own id, and the highest wins. Nothing is stored, all gateways agree, and where a replica joins or leaves, only its own
conversations move. Bounded loads (arXiv:1608.01350): replicas with more than their share are passed over.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

# Of the first message: prompts that begin alike, as questions on one document do, go to one replica.
_KEY_CHARS = 1024

# A replica takes this many requests whatever the others have, and this times the mean beyond.
_FREE_LOAD = 4
_LOAD_FACTOR = 1.25

# Share of the replicas that an adapter's requests are kept to: steps have few adapters then, and prefixes are found.
_ADAPTER_SHARE = 0.25
_MIN_ADAPTER_REPLICAS = 2


@dataclass(frozen=True, slots=True)
class Affinity:
    """What of a request decides where it goes.

    Attributes:
        model: as the client named it; empty where it did not.
        beginning: of the conversation; empty where nothing is known of it.
    """

    model: str = ""
    beginning: str = ""


def read_affinity(body: bytes) -> Affinity:
    """Of a request's body. One that is not understood has none; the replica will refuse it."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return Affinity()
    if not isinstance(fields, dict):
        return Affinity()
    model = fields.get("model")
    return Affinity(model if isinstance(model, str) else "", _beginning(fields))


def _beginning(fields: dict[str, Any]) -> str:
    """OpenAI's `prompt_cache_key` where there is one, else instructions, system messages and the first words."""
    if isinstance(key := fields.get("prompt_cache_key"), str) and key:
        return key
    parts = [_text(fields.get("instructions"))]
    turns = fields.get("messages", fields.get("input", fields.get("prompt")))
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return "\n".join([*parts, _text(turns)[:_KEY_CHARS]])
    for turn in turns:
        text = _text(turn.get("content"))
        if turn.get("role") not in ("system", "developer"):
            return "\n".join([*parts, text[:_KEY_CHARS]])
        parts.append(text)
    return "\n".join(parts)


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    return "" if content is None else msgspec.json.encode(content).decode()


class ReplicaOrder:
    """The order in which replicas are asked to take a request.

    Args:
        adapters: models that are adapters; others may go to any replica.
    """

    def __init__(self, adapters: Sequence[str] = ()) -> None:
        self._adapters = frozenset(adapters)

    def rank(self, affinity: Affinity, replicas: Sequence[str], loads: Sequence[int]) -> list[int]:
        """Indices of all replicas, the best first.

        Args:
            affinity: of the request.
            replicas: ids, distinct.
            loads: requests that each has now, as far as is known here.
        """
        load = np.asarray(loads)
        limit = max(_FREE_LOAD, math.ceil(_LOAD_FACTOR * (load.sum() + 1) / max(1, len(load))))
        is_full = load >= limit
        # np.lexsort: the last key counts first. Full replicas come last, those with least to do before the others.
        keys: list[NDArray[Any]] = [_scores(f"{affinity.model}\n{affinity.beginning}", tuple(replicas))]
        if affinity.model in self._adapters:
            keys.append(self._is_away(affinity.model, tuple(replicas)))
        if not affinity.beginning:
            keys.append(load)
        return [int(index) for index in np.lexsort((*keys, np.where(is_full, load, 0), is_full))]

    def _is_away(self, adapter: str, replicas: tuple[str, ...]) -> NDArray[np.bool_]:
        num_home = max(_MIN_ADAPTER_REPLICAS, math.ceil(_ADAPTER_SHARE * len(replicas)))
        is_away = np.ones(len(replicas), dtype=np.bool_)
        is_away[np.argsort(_scores(adapter, replicas))[:num_home]] = False
        return is_away


def _scores(key: str, replicas: tuple[str, ...]) -> NDArray[np.uint64]:
    """[len(replicas)], the lowest is the best; splitmix64's finaliser over both hashes."""
    with np.errstate(over="ignore"):
        mixed = _hashes(replicas) ^ np.uint64(_hash(key))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


@lru_cache(maxsize=8)
def _hashes(replicas: tuple[str, ...]) -> NDArray[np.uint64]:
    return np.asarray([_hash(replica) for replica in replicas], dtype=np.uint64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
