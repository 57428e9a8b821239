"""The compatibility page is the generated one; every field of OpenAI's works, is reported or is refused by name."""

from pathlib import Path

import pytest

from server.http.ignored import IGNORED_FIELDS_HEADER
from server.openai.shared.api_model import ANY_VALUE
from tests.compatibility_page import ENDPOINTS, Endpoint, known_fields, render_compatibility_page
from tests.server.fakes import MODEL_NAME
from tests.server.harness import RunningServer

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "compatibility.md"
BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
}
REFUSED = [(endpoint.path, name) for endpoint in ENDPOINTS for name in sorted(endpoint.model.refused)]
UNSERVED = [
    (endpoint.path, name)
    for endpoint in ENDPOINTS
    for name in sorted(endpoint.openai | known_fields(endpoint.model))
    if name not in known_fields(endpoint.model) - endpoint.model.without_effect.keys() and name != "schema"
]


def test_the_page_is_the_one_generated() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_compatibility_page(), "run `make docs`"


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_others_are_only_said_to_have_fields_of_the_table(endpoint: Endpoint) -> None:
    """A field that is renamed here must not leave what was said of it behind."""
    rows = endpoint.openai | known_fields(endpoint.model)
    said = endpoint.vllm | endpoint.vllm_says.keys() | endpoint.llama_server | endpoint.transformers_serve
    assert said <= rows


@pytest.mark.parametrize(("path", "name"), REFUSED)
def test_a_field_that_would_change_the_answer_is_refused_by_name(server: RunningServer, path: str, name: str) -> None:
    body = {"model": MODEL_NAME, **BODIES[path], name: {"unlikely": ["value"]}}
    response = server.shared_http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == name


@pytest.mark.parametrize(("path", "name"), UNSERVED)
def test_a_field_without_effect_is_reported_where_its_value_means_something(
    server: RunningServer, path: str, name: str
) -> None:
    body = {"model": MODEL_NAME, **BODIES[path], name: {"unlikely": ["value"]}}
    response = server.shared_http.post(path, json=body)
    assert response.status_code == 200, response.text
    model = next(endpoint.model for endpoint in ENDPOINTS if endpoint.path == path)
    reported = None if model.without_effect.get(name) == ANY_VALUE else name
    assert response.headers.get(IGNORED_FIELDS_HEADER) == reported


@pytest.mark.parametrize(("path", "name"), [*REFUSED, *UNSERVED])
@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_null_and_empty_count_as_left_out(server: RunningServer, path: str, name: str, empty: object) -> None:
    response = server.shared_http.post(path, json={"model": MODEL_NAME, **BODIES[path], name: empty})
    assert response.status_code == 200
    assert IGNORED_FIELDS_HEADER not in response.headers
