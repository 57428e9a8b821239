"""ResponseStore: answers that clients may ask for again, or continue from, in SQLite.

It knows ids, owners and JSON, not what is in it. Each owner (an API key) sees its own responses alone. The number of
responses and their age are bounded: those that nobody used for longest go first, and a conversation that is continued
keeps all of its responses in use.
"""

import asyncio
import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog
from pydantic import JsonValue

from .http.errors import ItemNotFound, PreviousResponseNotFound, ResponseNotFound, StoreUnavailable

Item = dict[str, JsonValue]
Body = dict[str, JsonValue]
_Result = TypeVar("_Result")

# One process writes, others of the same server wait for it.
_BUSY_SECONDS = 5.0
_SECONDS_PER_DAY = 86400.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, used_at REAL NOT NULL, previous_id TEXT, input TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_by_use ON responses (used_at);
CREATE TABLE IF NOT EXISTS items (
    id TEXT NOT NULL, owner TEXT NOT NULL, response_id TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
    PRIMARY KEY (owner, id, response_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_by_response ON items (response_id);
"""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and what it answered.

    Attributes:
        previous_id: the response that it continues, None for none.
        input: items of its own request, without those of the responses before.
        body: as the client got it.
    """

    id: str
    previous_id: str | None
    input: list[Item]
    body: Body

    @property
    def output(self) -> list[Item]:
        """The items of the answer."""
        return self.body["output"]  # type: ignore[return-value]

    @property
    def items(self) -> dict[str, Item]:
        """All items that have an id, by it."""
        items = (*self.input, *self.output)
        return {item["id"]: item for item in items if isinstance(item.get("id"), str)}  # type: ignore[misc]


def owner_of(authorization: str | None) -> str:
    """Whose responses a request may see: a digest of the key that it authenticates with, "" for none."""
    _, _, key = (authorization or "").partition(" ")
    return hashlib.sha256(key.strip().encode()).hexdigest() if key else ""


class ResponseStore:
    """Keeps responses; every call runs on a thread of the store's own.

    Args:
        path: of the database; None keeps it in memory, for as long as the process lives.
        max_responses: kept at a time.
        max_days: since a response was last used.
        clock: tells Unix time in seconds.
    """

    def __init__(
        self, path: Path | None, *, max_responses: int, max_days: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._max_responses = max_responses
        self._max_seconds = max_days * _SECONDS_PER_DAY
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="responses")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Open the database now rather than with the first request; where that fails, the log says so."""
        with contextlib.suppress(StoreUnavailable):
            await self._run(lambda _: None)

    async def put(self, owner: str, response: StoredResponse) -> None:
        """Keep a response, or its newer state under the same id (StoreUnavailable)."""
        await self._run(lambda connection: self._put(connection, owner, response))

    async def get(self, owner: str, response_id: str) -> StoredResponse:
        """A response (ResponseNotFound, StoreUnavailable)."""
        found = await self._run(lambda connection: self._chain(connection, owner, response_id, 1))
        if not found:
            raise _not_found(response_id)
        return found[0]

    async def conversation(self, owner: str, response_id: str) -> list[StoredResponse]:
        """A response behind all those that it continues, the first one first.

        Raises:
            PreviousResponseNotFound: one of them is not stored any more, or never was.
            StoreUnavailable: the database cannot be read.
        """
        chain = await self._run(lambda connection: self._chain(connection, owner, response_id, self._max_responses))
        missing = chain[-1].previous_id if chain else response_id
        if missing is not None:
            raise PreviousResponseNotFound(
                f"previous_response_id={response_id!r}: response {missing!r} is not stored; it may have been deleted "
                "or dropped for newer ones: send the whole conversation as input",
                param="previous_response_id",
            )
        return chain[::-1]

    async def items(self, owner: str, item_ids: Sequence[str]) -> dict[str, Item]:
        """Items of inputs and answers by id (ItemNotFound where one is unknown, StoreUnavailable)."""
        found = await self._run(lambda connection: self._items(connection, owner, item_ids))
        missing = next((item_id for item_id in item_ids if item_id not in found), None)
        if missing is not None:
            raise ItemNotFound(f"input: item {missing!r} is not stored; send the item itself", param="input")
        return found

    async def delete(self, owner: str, response_id: str) -> None:
        """Forget a response (ResponseNotFound, StoreUnavailable)."""
        num_deleted = await self._run(
            lambda connection: (
                connection.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (response_id, owner)).rowcount
            )
        )
        if not num_deleted:
            raise _not_found(response_id)

    async def close(self) -> None:
        """Close the database."""
        if self._connection is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._connection.close)
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """The result of work in a transaction of its own."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)
        except (sqlite3.Error, OSError) as error:
            _log.warning("response store failed", path=str(self._path or "memory"), error=str(error))
            raise StoreUnavailable(
                "stored responses cannot be read or written at the moment; send the whole conversation as input"
            ) from error

    def _transact(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        if self._connection is None:
            self._connection = self._open()
        try:
            with self._connection:  # commits, or rolls back
                return work(self._connection)
        except sqlite3.Error:
            if self._path is not None:  # the file may be whole again when it is opened next
                self._connection.close()
                self._connection = None
            raise

    def _open(self) -> sqlite3.Connection:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path or ":memory:", timeout=_BUSY_SECONDS, check_same_thread=False)
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_SCHEMA)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _put(self, connection: sqlite3.Connection, owner: str, response: StoredResponse) -> None:
        now = self._clock()
        connection.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (response.id, owner))
        connection.execute(
            "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)",
            (response.id, owner, now, response.previous_id, json.dumps(response.input), json.dumps(response.body)),
        )
        connection.executemany(
            "INSERT INTO items VALUES (?, ?, ?)", [(item_id, owner, response.id) for item_id in response.items]
        )
        connection.execute("DELETE FROM responses WHERE used_at < ?", (now - self._max_seconds,))
        connection.execute(
            "DELETE FROM responses WHERE id IN (SELECT id FROM responses ORDER BY used_at DESC LIMIT -1 OFFSET ?)",
            (self._max_responses,),
        )

    def _chain(
        self, connection: sqlite3.Connection, owner: str, response_id: str, max_responses: int
    ) -> list[StoredResponse]:
        """A response and those before it as far as they are stored, the latest first; all count as used now."""
        chain: list[StoredResponse] = []
        wanted: str | None = response_id
        while wanted is not None and len(chain) < max_responses:
            row = connection.execute(
                "SELECT previous_id, input, body FROM responses WHERE id = ? AND owner = ? AND used_at >= ?",
                (wanted, owner, self._clock() - self._max_seconds),
            ).fetchone()
            if row is None:
                break
            chain.append(StoredResponse(wanted, row[0], json.loads(row[1]), json.loads(row[2])))
            wanted = row[0]
        now = self._clock()
        connection.executemany("UPDATE responses SET used_at = ? WHERE id = ?", [(now, one.id) for one in chain])
        return chain

    def _items(self, connection: sqlite3.Connection, owner: str, item_ids: Sequence[str]) -> dict[str, Item]:
        """The items that are stored; those of several responses as the latest of them has them."""
        holders: dict[str, set[str]] = {}
        for item_id in item_ids:
            row = connection.execute(
                "SELECT response_id FROM items JOIN responses ON responses.id = response_id "
                "WHERE items.owner = ? AND items.id = ? ORDER BY used_at DESC LIMIT 1",
                (owner, item_id),
            ).fetchone()
            if row is not None:
                holders.setdefault(row[0], set()).add(item_id)
        found: dict[str, Item] = {}
        for response_id, held in holders.items():
            for response in self._chain(connection, owner, response_id, 1):
                found |= {item_id: item for item_id, item in response.items.items() if item_id in held}
        return found


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(
        f"response {response_id!r} is not stored; it may have been deleted, or dropped for newer ones"
    )
