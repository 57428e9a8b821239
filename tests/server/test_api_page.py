"""docs/reference/api.md names every field, endpoint and error code there is."""

import re
from pathlib import Path

import pytest

from server.app import create_app
from server.http.errors import HTTP_ERRORS
from server.openai.chat.messages import Message
from server.openai.chat.request import ChatCompletionRequest
from server.openai.completions.request import CompletionRequest
from server.openai.responses.request import ResponseRequest
from server.openai.shared.sampling import GenerationRequest, StreamOptions
from server.settings import ServerSettings
from tests.compatibility_page import known_fields
from tests.server.fakes import ScriptedEngine

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "api.md").read_text(encoding="utf-8")


def section(title: str) -> set[str]:
    """Every name in backquotes under a heading."""
    body = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return set(re.findall(r"`([^`]+)`", body))


@pytest.mark.parametrize(
    ("title", "body_type"), [("Chat completions", ChatCompletionRequest), ("Completions", CompletionRequest)]
)
def test_every_field_is_in_the_table(title: str, body_type: type[GenerationRequest]) -> None:
    fields = known_fields(body_type)
    shared = section("Fields of both completion endpoints")
    assert fields - {"stream_options"} <= shared | section(title) | section("Ignored fields")
    assert GenerationRequest.model_fields.keys() - {"stream_options"} <= shared


def test_every_field_of_responses_is_in_the_table() -> None:
    assert known_fields(ResponseRequest) <= section("Responses") | section("Ignored fields")
    assert ResponseRequest.model_fields.keys() <= section("Responses")


def test_every_stream_option_and_message_field_is_in_a_table() -> None:
    options = {f"stream_options.{name}" for name in StreamOptions.model_fields}
    assert options <= section("Fields of both completion endpoints")
    assert Message.model_fields.keys() - {"role"} <= section("Chat completions")


def test_every_endpoint_is_in_the_table() -> None:
    app = create_app(ScriptedEngine(), ServerSettings())
    paths = list(app.openapi()["paths"])
    named = section("Endpoints")
    assert paths
    assert all(any(name.endswith(path) for name in named) for path in paths)


def test_every_error_code_is_in_the_table() -> None:
    sent = {row.code for row in HTTP_ERRORS.values() if row.code is not None}
    assert sent <= section("Errors")
