"""Whose request it is and how urgent reaches the queue, and changes nothing else."""

from collections.abc import Mapping

import pytest
from pydantic import ValidationError

from cllm_core.request import NewRequest
from server.settings import ServerSettings
from tests.server.fakes import MODEL_NAME, ScriptedEngine
from tests.server.harness import running

CHAT: dict[str, object] = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
PATHS: dict[str, dict[str, object]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": MODEL_NAME, "prompt": "Hi", "max_tokens": 4},
    "/v1/responses": {"model": MODEL_NAME, "input": "Hi", "max_output_tokens": 16},
}


def queued(
    body: Mapping[str, object],
    path: str = "/v1/chat/completions",
    key: str = "",
    settings: Mapping[str, object] | None = None,
) -> NewRequest:
    """The request that the engine gets."""
    engine = ScriptedEngine()
    with running(engine, **(settings or {})) as server:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        assert server.shared_http.post(path, json=dict(body), headers=headers).status_code == 200
    return engine.requests[0]


@pytest.mark.parametrize("path", PATHS)
def test_users_are_told_apart_by_what_the_body_says(path: str) -> None:
    users = [queued(PATHS[path] | extra, path).user for extra in ({}, {"user": "ann"}, {"safety_identifier": "ann"})]
    other = queued(PATHS[path] | {"user": "bob"}, path).user
    assert users[0] == ""
    assert users[1] == users[2] != ""
    assert other not in users
    assert "bob" not in other


def test_where_there_are_several_keys_users_are_their_keys_whatever_the_body_says() -> None:
    keys = {"api_keys": ("one", "two")}
    users = {queued(CHAT | {"user": name}, key="one", settings=keys).user for name in ("ann", "bob")}
    assert len(users) == 1
    assert queued(CHAT, key="two", settings=keys).user not in users
    assert queued(CHAT, key="one", settings={"api_keys": ("one",)}).user == ""


def test_labels_of_other_types_are_labels_too() -> None:
    assert queued(CHAT | {"user": {"id": 5}}).user == queued(CHAT | {"user": {"id": 5}}).user != ""


def test_a_key_brings_its_weight() -> None:
    settings = {"api_keys": ("one", "t=wo"), "key_weights": ("t=wo=2.5",)}
    assert [queued(CHAT, key=key, settings=settings).weight for key in ("one", "t=wo")] == [1.0, 2.5]


@pytest.mark.parametrize(
    ("entry", "message"),
    [("other=2", "entry 1: must be KEY=WEIGHT"), ("one", "entry 1: must be KEY=WEIGHT")]
    + [(f"one={weight}", "the weight must be a number above 0") for weight in ("0", "-1", "nan", "inf", "x", "")],
)
def test_a_wrong_weight_is_refused_without_the_key(entry: str, message: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=message) as refused:
        ServerSettings(api_keys=("one",), key_weights=(entry,))
    assert "one=" not in str(refused.value).splitlines()[2].split("[")[0]


def test_priority_counts_only_where_the_policy_says_so() -> None:
    assert queued(CHAT | {"priority": -3}, settings={"scheduling_policy": "priority"}).priority == -3
    engine = ScriptedEngine()
    with running(engine) as server:
        answers = [server.shared_http.post("/v1/chat/completions", json=CHAT | {"priority": p}) for p in (0, 7)]
    assert [answer.headers.get("x-ignored-fields") for answer in answers] == [None, "priority"]
    assert [request.priority for request in engine.requests] == [0, 0]


@pytest.mark.parametrize("value", [1.5, "high", 2**40, True])
def test_a_priority_that_is_no_whole_number_is_refused(value: object) -> None:
    with running(ScriptedEngine()) as server:
        answer = server.shared_http.post("/v1/chat/completions", json=CHAT | {"priority": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")


def test_more_outputs_than_can_ever_be_queued_are_refused_for_good() -> None:
    with running(ScriptedEngine(max_requests=3)) as server:
        answers = [server.shared_http.post("/v1/chat/completions", json=CHAT | {"n": n}) for n in (3, 4)]
    assert [answer.status_code for answer in answers] == [200, 400]
    error = answers[1].json()["error"]
    assert (error["param"], "at most 3 at a time" in error["message"]) == ("n", True)
