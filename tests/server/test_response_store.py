"""Stored responses: what was put in comes out, for its owner alone, within bounds of number and age."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from server.http.errors import ItemNotFound, PreviousResponseNotFound, ResponseNotFound, StoreUnavailable
from server.response_store import ResponseStore, StoredResponse, owner_of
from server.settings import ServerSettings

DAY = 86400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


class MakeStore(Protocol):
    def __call__(self, path: Path | None = None, *, most: int = 100, clock: Clock | None = None) -> ResponseStore: ...


@pytest.fixture
async def make_store() -> AsyncIterator[MakeStore]:
    made: list[ResponseStore] = []

    def make(path: Path | None = None, *, most: int = 100, clock: Clock | None = None) -> ResponseStore:
        made.append(ResponseStore(path, max_responses=most, max_days=30, clock=clock or Clock()))
        return made[-1]

    yield make
    for store in made:
        await store.close()


def make_response(number: int, previous: int | None = None) -> StoredResponse:
    return StoredResponse(
        id=f"resp_{number}",
        previous_id=None if previous is None else f"resp_{previous}",
        input=[{"type": "message", "role": "user", "content": f"question {number}"}],
        body={"id": f"resp_{number}", "output": [{"type": "message", "id": f"msg_{number}", "content": []}]},
    )


@pytest.mark.parametrize("in_memory", [True, False])
async def test_a_response_comes_back_as_it_was_put(make_store: MakeStore, in_memory: bool, tmp_path: Path) -> None:
    store = make_store(None if in_memory else tmp_path / "new" / "responses.db")
    await store.put("me", make_response(1))
    assert await store.get("me", "resp_1") == make_response(1)
    assert await store.items("me", ["msg_1"]) == {"msg_1": make_response(1).output[0]}
    await store.delete("me", "resp_1")
    with pytest.raises(ResponseNotFound, match="resp_1"):
        await store.get("me", "resp_1")
    with pytest.raises(ResponseNotFound):
        await store.delete("me", "resp_1")
    with pytest.raises(ItemNotFound, match="msg_1"):
        await store.items("me", ["msg_1"])


async def test_nobody_sees_changes_or_deletes_what_another_key_owns(make_store: MakeStore) -> None:
    store = make_store()
    await store.put(owner_of("Bearer one"), make_response(1))
    other = owner_of("Bearer two")
    for attempt in (store.get(other, "resp_1"), store.delete(other, "resp_1")):
        with pytest.raises(ResponseNotFound):
            await attempt
    with pytest.raises(PreviousResponseNotFound):
        await store.conversation(other, "resp_1")
    with pytest.raises(ItemNotFound):
        await store.items(other, ["msg_1"])
    assert await store.get(owner_of("Bearer one"), "resp_1")


async def test_a_conversation_is_told_from_its_first_response_on(make_store: MakeStore) -> None:
    store = make_store()
    for number in range(5):
        await store.put("me", make_response(number, number - 1 if number else None))
    assert [one.id for one in await store.conversation("me", "resp_3")] == ["resp_0", "resp_1", "resp_2", "resp_3"]
    await store.delete("me", "resp_1")
    with pytest.raises(PreviousResponseNotFound, match=r"'resp_3': response 'resp_1' is not stored"):
        await store.conversation("me", "resp_3")


async def test_the_least_recently_used_go_first_and_a_conversation_that_goes_on_stays_whole(
    make_store: MakeStore,
) -> None:
    clock = Clock()
    store = make_store(most=4, clock=clock)
    await store.put("me", make_response(0))
    for number in range(1, 10):
        clock.now += 1
        await store.conversation("me", "resp_0")
        clock.now += 1
        await store.put("me", make_response(number))
    for number in range(10):
        if number in (0, 7, 8, 9):
            assert await store.get("me", f"resp_{number}")
        else:
            with pytest.raises(ResponseNotFound):
                await store.get("me", f"resp_{number}")


async def test_what_nobody_used_for_longer_than_the_limit_is_gone(make_store: MakeStore) -> None:
    clock = Clock()
    store = make_store(clock=clock)
    await store.put("me", make_response(1))
    clock.now += 29 * DAY
    assert await store.get("me", "resp_1")
    clock.now += 31 * DAY
    with pytest.raises(ResponseNotFound):
        await store.get("me", "resp_1")


async def test_two_processes_share_one_file(make_store: MakeStore, tmp_path: Path) -> None:
    one, other = (make_store(tmp_path / "responses.db") for _ in range(2))
    await one.put("me", make_response(1))
    await other.put("me", make_response(2, 1))
    assert [response.id for response in await one.conversation("me", "resp_2")] == ["resp_1", "resp_2"]


async def test_an_item_outlives_one_of_two_responses_that_hold_it(make_store: MakeStore) -> None:
    store = make_store()
    again = make_response(1).output[0]
    await store.put("me", make_response(1))
    await store.put("me", replace(make_response(2), input=[again]))
    await store.delete("me", "resp_2")
    assert await store.items("me", ["msg_1"]) == {"msg_1": again}


async def test_one_key_is_one_owner_however_it_is_sent() -> None:
    assert owner_of("Bearer key") == owner_of("bearer  key ") != owner_of("Bearer other")


async def test_a_store_whose_folder_cannot_be_made_is_an_error(make_store: MakeStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable):
        await make_store(tmp_path / "file" / "responses.db").put("me", make_response(1))


async def test_a_file_that_is_no_database_is_an_error_that_says_what_to_do(
    make_store: MakeStore, tmp_path: Path
) -> None:
    (tmp_path / "responses.db").write_bytes(b"not a database" * 1000)
    store = make_store(tmp_path / "responses.db")
    with pytest.raises(StoreUnavailable, match="send the whole conversation"):
        await store.put("me", make_response(1))


async def test_a_store_works_again_as_soon_as_its_file_does(make_store: MakeStore, tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    path.write_bytes(b"not a database" * 1000)
    store = make_store(path)
    await store.open()  # says so in the log only
    with pytest.raises(StoreUnavailable):
        await store.put("me", make_response(1))
    path.unlink()
    await store.put("me", make_response(1))
    assert (await store.get("me", "resp_1")).id == "resp_1"


def test_a_folder_is_no_place_for_a_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        ServerSettings(response_store=str(tmp_path))
    assert ServerSettings(response_store="OFF").response_store == "off"
