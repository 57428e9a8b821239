"""docs/compatibility.md is the one generated, and every field of OpenAI's is known or refused by its name."""

from pathlib import Path

import pytest

from tests.compatibility_page import ENDPOINTS, Endpoint, render_compatibility_page
from tests.server.fakes import MODEL_NAME
from tests.server.harness import RunningServer

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
}
UNSERVED = [
    (endpoint.path, name)
    for endpoint in ENDPOINTS
    for name in sorted(endpoint.openai | endpoint.model.refusable.keys())
    if name not in endpoint.model.model_fields
]


def test_the_page_is_the_one_generated() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_compatibility_page(), "run `make docs`"


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_others_are_only_said_to_have_fields_of_the_table(endpoint: Endpoint) -> None:
    """A field that is renamed here must not leave what was said of it behind."""
    rows = endpoint.openai | endpoint.model.model_fields.keys() | endpoint.model.refusable.keys()
    said = endpoint.vllm | endpoint.vllm_says.keys() | endpoint.llama_server | endpoint.transformers_serve
    assert said <= rows


@pytest.mark.parametrize(("path", "name"), UNSERVED)
def test_a_field_that_is_not_served_is_named_when_it_asks_for_something(
    server: RunningServer, path: str, name: str
) -> None:
    body = {"model": MODEL_NAME, **BODIES[path], name: {"unlikely": ["value"]}}
    response = server.shared_http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == name


@pytest.mark.parametrize(("path", "name"), UNSERVED)
def test_null_counts_as_left_out(server: RunningServer, path: str, name: str) -> None:
    response = server.shared_http.post(path, json={"model": MODEL_NAME, **BODIES[path], name: None})
    endpoint = next(endpoint for endpoint in ENDPOINTS if endpoint.path == path)
    assert response.status_code == (200 if name in endpoint.model.refusable else 400)
