"""What operators rely on: health, metrics, keys, request ids, logs, CORS, the schema."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AuthenticationError
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from cllm_core import __version__
from server.app import create_app
from server.http.errors import HTTP_ERRORS, http_error_of
from server.settings import ServerSettings
from tests.server.fakes import MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running, wait_until

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def keyed_server() -> Iterator[RunningServer]:
    with running(ScriptedEngine(), api_keys=("first", "second")) as server:
        yield server


def test_health_and_readiness_follow_the_engine() -> None:
    with running(ScriptedEngine()) as server, server.http() as http:
        assert http.get("/ready").json() == {
            "status": "ok", "engine": "ready", "detail": "scripted to be ready", "progress": 1.0, "num_restarts": 0,
        }  # fmt: skip
        server.in_loop(lambda: server.engine.become("failed"))
        assert http.get("/health").status_code == 503
        assert http.get("/health").json()["status"] == "failed"


@pytest.mark.parametrize("key", ["first", "second"])
def test_every_api_key_opens_the_api(keyed_server: RunningServer, key: str) -> None:
    assert keyed_server.openai(api_key=key).models.list().data


def test_without_a_valid_key_the_api_stays_closed(keyed_server: RunningServer) -> None:
    with pytest.raises(AuthenticationError) as caught:
        keyed_server.openai(api_key="third").models.list()
    assert caught.value.code == "invalid_api_key"
    with keyed_server.http() as http:
        for headers in ({}, {"authorization": "first"}, {"authorization": "Basic first"}, {"authorization": "Bearer"}):
            assert http.post(CHAT, json=BODY, headers=headers).status_code == 401
        assert http.get("/v1/models").headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_need_no_key(keyed_server: RunningServer, path: str) -> None:
    with keyed_server.http() as http:
        assert http.get(path).status_code == 200


def test_a_key_beyond_ascii_opens_the_api_as_utf_8_and_as_latin_1() -> None:
    """Clients differ; the last byte of this key in UTF-8 is white space in Latin-1."""
    key = "k\N{LATIN SMALL LETTER A WITH GRAVE}"
    with running(ScriptedEngine(), api_keys=(key,)) as server, server.http() as http:
        answers = {
            sent: http.get("/v1/models", headers=[(b"authorization", b"Bearer " + sent)]).status_code
            for sent in (key.encode(), key.encode("latin-1"), key[:-1].encode())
        }
    assert list(answers.values()) == [200, 200, 401]


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", f"/v1/models/{MODEL_NAME}"])
def test_what_can_be_read_can_be_asked_for_without_its_body(server: RunningServer, path: str) -> None:
    head, get = server.shared_http.head(path), server.shared_http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def samples(text: str) -> dict[tuple[str, str], float]:
    """Value by name and, where there is one, endpoint; of buckets only the counts and sums."""
    return {
        (sample.name, sample.labels.get("endpoint", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_metrics_count_what_was_served() -> None:
    with running(ScriptedEngine(chunk_sizes=(4,))) as server, server.http() as http:
        usage = http.post(CHAT, json={**BODY, "max_tokens": 8}).json()["usage"]
        values = samples(http.get("/metrics").text)
    assert values["cllm_requests_total", CHAT] == 1
    assert values["cllm_completion_tokens_total", ""] == usage["completion_tokens"] == 8
    assert values["cllm_prompt_tokens_total", ""] == usage["prompt_tokens"]
    assert values["cllm_forward_passes_total", ""] == values["cllm_accepted_tokens_per_iteration_count", ""] == 2
    assert values["cllm_request_tokens_per_forward_sum", ""] == 4.0
    assert values["cllm_time_to_first_token_seconds_count", ""] == 1
    assert values["cllm_inter_chunk_seconds_count", ""] == 1
    assert (values["cllm_ready", ""], values["cllm_cache_usage_ratio", ""]) == (1.0, 0.25)


def test_unknown_paths_share_one_label() -> None:
    with running(ScriptedEngine()) as server, server.http() as http:
        http.get("/made/up/1")
        http.get("/made/up/2")
        text = http.get("/metrics").text
    assert 'endpoint="unmatched"' in text
    assert "made" not in text


@pytest.mark.parametrize(("given", "is_kept"), [("abc-123_/.:", True), ("bad id!", False), ("x" * 129, False)])
def test_a_sane_request_id_comes_back_and_others_are_replaced(server: RunningServer, given: str, is_kept: bool) -> None:
    with server.http() as http:
        answered = http.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
    assert (answered == given) is is_kept
    assert answered


def test_each_request_leaves_one_access_line_with_its_tokens() -> None:
    with capture_logs() as logs, running(ScriptedEngine(chunk_sizes=(4,))) as server, server.http() as http:
        http.post(CHAT, json={**BODY, "max_tokens": 8, "stream": True})
        wait_until(lambda: any(line.get("path") == CHAT for line in logs))
    # Logs are the process's: the line of a request to another server may come late.
    (line,) = [line for line in logs if line.get("path") == CHAT]
    assert (line["event"], line["status"], line["completion_tokens"]) == ("request", 200, 8)
    assert line["tokens_per_forward"] == 4.0
    assert [line["event"] for line in logs if line["event"] == "ready"] == ["ready"]


def test_browsers_may_call_from_the_origins_given_only() -> None:
    with running(ScriptedEngine(), cors_origins=("https://page.example",)) as server, server.http() as http:
        allowed = http.get("/v1/models", headers={"origin": "https://page.example"})
        other = http.get("/v1/models", headers={"origin": "https://other.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert allowed.headers["access-control-expose-headers"] == "X-Request-Id, X-Ignored-Fields, Retry-After"
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("http://localhost:3000", True), ("https://127.0.0.1", True), ("http://[::1]:8080", True),
        ("https://page.example", False), ("http://localhost.example", False), ("null", False),
    ],
)  # fmt: skip
def test_pages_of_this_machine_may_call_by_default(server: RunningServer, origin: str, is_allowed: bool) -> None:
    answer = server.shared_http.get("/v1/models", headers={"origin": origin})
    assert answer.headers.get("access-control-allow-origin") == (origin if is_allowed else None)


@pytest.mark.parametrize(
    ("given", "origin", "is_allowed"),
    [
        ("none", "http://localhost:3000", False),
        ("https://page.example", "http://localhost:3000", False),
        ("https://page.example,localhost", "http://localhost:3000", True),
        ("https://page.example,localhost", "https://page.example", True),
    ],
)
def test_the_origins_given_take_the_place_of_the_default(given: str, origin: str, is_allowed: bool) -> None:
    with running(ScriptedEngine(), cors_origins=given) as server:
        answer = server.shared_http.get("/v1/models", headers={"origin": origin})
    assert ("access-control-allow-origin" in answer.headers) == is_allowed


@pytest.mark.parametrize("headers", [{}, {"access-control-request-private-network": "true"}])
def test_preflights_are_answered_without_a_key(headers: dict[str, str]) -> None:
    asked = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization, content-type, x-stainless-lang"
    with running(ScriptedEngine(), api_keys="secret") as server:
        answer = server.shared_http.options(CHAT, headers={**asked, **headers})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-headers"] == asked["access-control-request-headers"]
    assert ("access-control-allow-private-network" in answer.headers) == bool(headers)


def test_the_version_is_told() -> None:
    with running(ScriptedEngine(), api_keys="secret") as server:
        assert server.shared_http.get("/version").json() == {"version": __version__}


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_ping_tells_what_health_tells(method: str) -> None:
    with running(ScriptedEngine(), api_keys="secret") as server:
        assert server.shared_http.request(method, "/ping").status_code == 200
        server.in_loop(lambda: server.engine.become("failed"))
        assert server.shared_http.request(method, "/ping").status_code == 503


def test_the_openapi_schema_refers_only_to_what_it_defines() -> None:
    schema = create_app(ScriptedEngine(), ServerSettings()).openapi()
    defined = {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}
    assert set(_references(schema)) <= defined
    assert {CHAT, "/v1/completions", "/v1/models", "/health", "/ready", "/metrics"} <= set(schema["paths"])
    assert "422" not in json.dumps(schema["paths"])


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from _references(child)
    elif isinstance(node, list):
        for child in node:
            yield from _references(child)


def test_every_error_type_has_an_http_status() -> None:
    for kind, row in HTTP_ERRORS.items():
        error = kind("why")
        assert http_error_of(error) is row
        assert 400 <= row.status < 600


def test_importing_the_app_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, server.app, server.cli.serve; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
