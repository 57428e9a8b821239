"""Adapters are models of their own: listed, asked for by name, loaded and unloaded while the server runs."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from structlog.testing import capture_logs

from server.app import create_app
from server.settings import ServerSettings
from tests.server.fakes import MODEL_NAME, ScriptedEngine, make_adapter, make_info
from tests.server.harness import RunningServer, running

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
TEMPLATE = "SQL for: {{ messages[-1].content }}"


def engine_with_adapter() -> ScriptedEngine:
    """One adapter, "sql", with a chat template of its own."""
    info = make_info()
    tokenizer = msgspec.structs.replace(info.tokenizer, chat_template=TEMPLATE)
    adapters = (make_adapter("sql", "org/sql-lora", tokenizer=tokenizer),)
    return ScriptedEngine(info=msgspec.structs.replace(info, adapters=adapters), chunk_sizes=(4,))


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running(engine_with_adapter(), adapter_root="/adapters", served_model_names="big,small") as server:
        yield server


def chat(http: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "how many?"}]}
    return http.post("/v1/chat/completions", json=body)


def test_the_list_has_every_name_of_the_base_and_every_adapter(server: RunningServer) -> None:
    cards = server.shared_http.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"], card["root"]) for card in cards] == [
        ("big", None, MODEL_NAME),
        ("small", None, MODEL_NAME),
        ("sql", "big", "org/sql-lora"),
    ]
    assert [(card["block_length"], card["domain"]) for card in cards] == [(16, None), (16, None), (32, "text-to-sql")]
    assert server.shared_http.get("/v1/models/sql").json() == cards[2]


def test_an_adapter_is_asked_for_by_its_name(server: RunningServer) -> None:
    answers = [chat(server.shared_http, name).json() for name in ("sql", "small")]
    assert [answer["model"] for answer in answers] == ["sql", "small"]
    assert answers[0]["system_fingerprint"] != answers[1]["system_fingerprint"]
    assert [request.adapter for request in server.engine.requests] == ["sql", ""]


def test_an_adapter_speaks_by_its_own_template(server: RunningServer) -> None:
    chat(server.shared_http, "sql")
    assert server.engine.decode(server.engine.requests[0].prompt_ids) == "SQL for: how many?"


def test_metrics_and_log_tell_the_models_apart() -> None:
    with capture_logs() as logs, running(engine_with_adapter()) as server, server.http() as http:
        for name in ("sql", MODEL_NAME):
            assert chat(http, name).status_code == 200
        metrics = http.get("/metrics").text
    for name in ("sql", MODEL_NAME):
        assert f'cllm_time_to_first_token_seconds_count{{model="{name}"}} 1.0' in metrics
    assert [line["model"] for line in logs if line.get("path") == "/v1/chat/completions"] == ["sql", MODEL_NAME]


def test_a_loaded_adapter_serves_until_it_is_unloaded(server: RunningServer) -> None:
    http = server.shared_http
    assert chat(http, "chat").status_code == 404
    loaded = http.post(LOAD, json={"lora_name": "chat", "lora_path": "v2/chat"})
    assert (loaded.status_code, loaded.json()["id"], loaded.json()["root"]) == (200, "chat", "v2/chat")
    assert chat(http, "chat").json()["model"] == "chat"
    unloaded = http.post(UNLOAD, json={"lora_name": "chat"})
    assert unloaded.json() == {"id": "chat", "object": "model", "deleted": True}
    assert chat(http, "chat").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (LOAD, {"lora_name": "x", "lora_path": "/etc"}, 400, "lies outside of the folder"),
        (LOAD, {"lora_name": "sql", "lora_path": "sql"}, 400, "'sql' is already served"),
        (LOAD, {"lora_name": "small", "lora_path": "sql"}, 400, "'small' is already served"),
        (LOAD, {"lora_name": "../x", "lora_path": "sql"}, 400, "adapter name '../x': must be"),
        (LOAD, {"lora_name": "x"}, 400, "lora_path: required"),
        (UNLOAD, {"lora_name": "nobody"}, 404, "'nobody' does not exist here"),
        (UNLOAD, {"lora_name": "small"}, 400, "'small' is the base model"),
    ],
)
def test_bad_changes_are_refused_in_words(
    server: RunningServer, path: str, body: dict[str, object], status: int, message: str
) -> None:
    answer = server.shared_http.post(path, json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert len(server.shared_http.get("/v1/models").json()["data"]) == 3


def test_the_endpoints_are_off_unless_a_folder_is_named() -> None:
    with running(engine_with_adapter()) as server, server.http() as http:
        assert http.post(LOAD, json={"lora_name": "x", "lora_path": "x"}).status_code == 404
        assert http.post(UNLOAD, json={"lora_name": "sql"}).status_code == 404
        assert chat(http, "sql").status_code == 200


def test_changing_adapters_needs_a_key_where_keys_are_required() -> None:
    with running(engine_with_adapter(), adapter_root="/adapters", api_keys="secret") as server, server.http() as http:
        assert http.post(UNLOAD, json={"lora_name": "sql"}).status_code == 401


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [(None, 401, "invalid_api_key"), ("client", 403, "admin_key_required"), ("root", 200, None)],
)
def test_changing_adapters_needs_an_administrators_key_where_there_are_any(
    key: str | None, status: int, code: str | None
) -> None:
    settings = {"adapter_root": "/adapters", "api_keys": "client", "admin_keys": "root"}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with running(engine_with_adapter(), **settings) as server, server.http() as http:
        answer = http.post(UNLOAD, json={"lora_name": "sql"}, headers=headers)
    assert (answer.status_code, answer.json().get("error", {}).get("code")) == (status, code)


def test_an_administrators_key_is_good_for_everything_and_alone_closes_nothing_else() -> None:
    with running(engine_with_adapter(), api_keys="client", admin_keys="root") as server, server.http() as http:
        assert http.get("/v1/models", headers={"authorization": "Bearer root"}).status_code == 200
        assert http.get("/v1/models").status_code == 401
    with running(engine_with_adapter(), adapter_root="/adapters", admin_keys="root") as server, server.http() as http:
        assert http.get("/v1/models").status_code == 200
        assert http.post(UNLOAD + "/", json={"lora_name": "sql"}).status_code == 401


def test_the_page_names_the_endpoints() -> None:
    page = (Path(__file__).parents[4] / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    paths = create_app(ScriptedEngine(), ServerSettings(adapter_root="/adapters")).openapi()["paths"]
    assert {LOAD, UNLOAD} <= paths.keys()
    assert all(f"`POST {path}`" in page for path in (LOAD, UNLOAD))
