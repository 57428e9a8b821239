"""Aliases: models by the names that clients insist on."""

from collections.abc import Iterator

import msgspec
import pytest
from pydantic import ValidationError

from server.settings import ServerSettings
from tests.server.fakes import MODEL_NAME, ScriptedEngine, make_adapter, make_info
from tests.server.harness import RunningServer, running

CHAT = "/v1/chat/completions"
ALIASES = f"gpt-4o={MODEL_NAME},coder=sql,lost=gone"


def chat(server: RunningServer, model: str) -> tuple[int, str]:
    """Status, and the model that answered or the message of the error."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    response = server.shared_http.post(CHAT, json=body)
    answer = response.json()
    return response.status_code, answer["model"] if response.status_code == 200 else answer["error"]["message"]


def make_engine() -> ScriptedEngine:
    return ScriptedEngine(info=msgspec.structs.replace(make_info(), adapters=(make_adapter("sql", "org/sql-lora"),)))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(make_engine(), model_aliases=ALIASES) as running_server:
        yield running_server


def test_an_alias_answers_under_its_own_name(server: RunningServer) -> None:
    assert chat(server, "gpt-4o") == (200, "gpt-4o")
    assert server.engine.requests[-1].adapter == ""
    assert chat(server, "coder") == (200, "coder")
    assert server.engine.requests[-1].adapter == "sql"


def test_aliases_are_listed_behind_the_models(server: RunningServer) -> None:
    cards = server.shared_http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == [MODEL_NAME, "sql", "gpt-4o", "coder"]
    assert server.shared_http.get("/v1/models/gpt-4o").json() == cards[2]
    assert cards[2]["root"] == cards[0]["root"]


def test_other_names_and_aliases_of_nothing_are_not_found(server: RunningServer) -> None:
    assert chat(server, "gpt-5")[0] == 404
    status, message = chat(server, "lost")
    assert (status, "an alias of 'gone'" in message) == (404, True)


def test_a_catch_all_answers_every_unknown_name() -> None:
    with running(make_engine(), model_aliases=f"*={MODEL_NAME},coder=sql") as server:
        assert chat(server, "claude-or-whatever") == (200, "claude-or-whatever")
        assert chat(server, "coder") == (200, "coder")
        assert server.engine.requests[-1].adapter == "sql"
        assert "*" not in server.shared_http.get("/v1/models").text


@pytest.mark.parametrize("given", ["gpt-4o", "=small", "gpt-4o=", "a=x,a=y"])
def test_bad_aliases_are_refused_at_the_start(given: str) -> None:
    with pytest.raises(ValidationError, match="model_aliases="):
        ServerSettings(model_aliases=given)  # type: ignore[arg-type]


def test_an_alias_cannot_hide_a_model() -> None:
    with pytest.raises(ValidationError, match="is the name of a served model"):
        ServerSettings(served_model_names=("small",), model_aliases=("small=x",))
