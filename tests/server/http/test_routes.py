"""Paths as clients join them: slashes behind them, and what is told where there is none."""

import pytest

from tests.server.fakes import MODEL_NAME
from tests.server.harness import RunningServer

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", f"{CHAT}/"), ("GET", "/v1/models/"), ("GET", f"/v1/models/{MODEL_NAME}/"), ("GET", "/health//")],
)
def test_slashes_behind_a_path_change_nothing(server: RunningServer, method: str, path: str) -> None:
    with_slash, without = (
        server.shared_http.request(method, one, json=BODY if method == "POST" else None)
        for one in (path, path.rstrip("/"))
    )
    assert (with_slash.status_code, without.status_code) == (200, 200)
    assert with_slash.json().keys() == without.json().keys()


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [
        ("POST", "/v1/embeddings", "POST /v1/embeddings: there is no such endpoint; /docs lists the endpoints"),
        ("POST", "/chat/completions", "the base URL must end in /v1"),
        ("POST", f"/v1{CHAT}", "the base URL ends in /v1 already"),
        ("GET", "/nothing", "GET /nothing: there is no such endpoint"),
        ("GET", CHAT, f"GET {CHAT}: the endpoint does not take this method; use POST"),
        ("DELETE", "/v1/models", "use GET"),
    ],
)
def test_what_does_not_exist_is_named_with_a_remedy(server: RunningServer, method: str, path: str, told: str) -> None:
    response = server.shared_http.request(method, path)
    assert response.status_code in (404, 405)
    assert told in response.json()["error"]["message"]


def test_a_long_path_is_quoted_by_its_beginning(server: RunningServer) -> None:
    assert len(server.shared_http.get("/x" * 2000).content) < 500
