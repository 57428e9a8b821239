"""The server keeps what its OpenAPI document says, whatever requests are made from the document."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance

from server.app import create_app
from server.openai.shared.api_model import EXAMPLE_MODEL
from server.settings import ServerSettings
from tests.server.fakes import ScriptedEngine, make_info
from tests.server.harness import RunningServer, running

API_KEY = "secret"

ApiCase = Case[Any]


@cache
def document() -> dict[str, Any]:
    return create_app(ScriptedEngine(), ServerSettings()).openapi()


def api(num_examples: int) -> schemathesis.BaseSchema:
    """The document for schemathesis, which shall ask for the served model mostly."""
    described = deepcopy(document())
    for schema in described["components"]["schemas"].values():
        model = schema.get("properties", {}).get("model", {})
        if "anyOf" in model:
            model["anyOf"][0] = {"enum": [EXAMPLE_MODEL]}
    generation = GenerationConfig(deterministic=True, max_examples=num_examples)
    config = SchemathesisConfig(projects=ProjectsConfig(default=ProjectConfig(generation=generation)))
    return schemathesis.openapi.from_dict(described, config=config)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    engine = ScriptedEngine(info=make_info(max_model_len=4096))  # room for tools in the prompt
    with running(engine, served_model_names=EXAMPLE_MODEL, api_keys=(API_KEY,)) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


def check(case: ApiCase, server: RunningServer, session: requests.Session) -> None:
    # Valid by the schema is not all: a prompt may be too long, and fields may contradict each other.
    case.call_and_validate(
        base_url=server.url,
        session=session,
        headers={"Authorization": f"Bearer {API_KEY}"},
        excluded_checks=[positive_data_acceptance],
    )


@api(num_examples=5).parametrize()
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_documented(case: ApiCase, server: RunningServer, session: requests.Session) -> None:
    check(case, server, session)


@pytest.mark.slow
@api(num_examples=1000).parametrize()
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_to_many_requests_are_as_documented(
    case: ApiCase, server: RunningServer, session: requests.Session
) -> None:
    check(case, server, session)


OPERATIONS = {
    "create_chat_completion", "create_completion", "create_response", "delete_response", "detokenize", "get_model",
    "get_response", "health", "list_input_items", "list_models", "metrics", "ready", "render_chat_completion",
    "tokenize", "version",
}  # fmt: skip


def operations() -> dict[str, dict[str, Any]]:
    """The documented operations by id."""
    methods = (operation for path in document()["paths"].values() for operation in path.values())
    return {operation["operationId"]: operation for operation in methods}


def test_names_of_operations_do_not_change() -> None:
    """Generated clients are written in them."""
    assert operations().keys() == OPERATIONS


def test_every_operation_of_the_api_documents_its_errors_as_openai_objects() -> None:
    for name in OPERATIONS - {"health", "ready", "metrics", "version"}:
        answers = operations()[name]["responses"]
        failures = {status: answer["content"] for status, answer in answers.items() if status != "200"}
        assert {"401", "500", "503"} <= failures.keys()
        assert all(
            content == {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
            for content in failures.values()
        )


def request_examples() -> list[tuple[str, dict[str, Any]]]:
    """Paths and the example bodies of what they take."""
    schemas = document()["components"]["schemas"]
    return [
        (path, example)
        for path, methods in document()["paths"].items()
        for operation in methods.values()
        if "requestBody" in operation
        for example in schemas[_body_name(operation)]["examples"]
    ]


def _body_name(operation: dict[str, Any]) -> str:
    reference: str = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return reference.rpartition("/")[2]


@pytest.mark.parametrize(("path", "body"), request_examples(), ids=str)
def test_every_example_is_served(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    with server.http(authorization=f"Bearer {API_KEY}") as http:
        response = http.post(path, json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", ["create_chat_completion", "create_completion", "create_response"])
@pytest.mark.parametrize("fails", [False, True])
def test_every_event_of_a_stream_is_as_documented(name: str, fails: bool) -> None:
    path, body = next((path, body) for path, body in request_examples() if operation_at(path) == name)
    content = operations()[name]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    validator = event_validator(content["properties"]["data"])
    engine = ScriptedEngine(step_seconds=0.05 if fails else 0.0)
    with (
        running(engine, served_model_names=EXAMPLE_MODEL) as server,
        server.http() as http,
        http.stream("POST", path, json={**body, "stream": True}) as response,
    ):
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        data = [next(lines)]
        if fails:
            server.in_loop(engine.kill_worker)
        data += lines
    assert len(data) > 1
    assert all(validator(json.loads(text)) for text in data if text != "[DONE]")
    assert (data[-1] == "[DONE]") == (not fails and name != "create_response")


def operation_at(path: str) -> str:
    (operation,) = document()["paths"][path].values()
    return str(operation["operationId"])


def event_validator(data: dict[str, Any]) -> Callable[[object], bool]:
    """Whether a value fits the documented content of an event's data."""
    [described, *_] = data.get("anyOf", [data])
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "components": document()["components"]}
    return jsonschema_rs.validator_for(schema | described["contentSchema"]).is_valid
