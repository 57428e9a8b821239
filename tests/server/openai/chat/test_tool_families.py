"""A conversation with tools over HTTP in the format of each family: asked, called, and the result sent back."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.dialect import find_dialect
from cllm_core.text.tools.functions import FunctionCall
from tests.server.fakes import MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running
from tests.text.factories import byte_level, make_codec
from tests.text.tool_templates import HARMONY, TEMPLATES

CHAT = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "Will it rain?"}
CITY = "Łódź"
ARGUMENTS = {"city": CITY, "days": 2, "unit": None}
CALL = FunctionCall("get_weather", json.dumps(ARGUMENTS, ensure_ascii=False))
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F", None]},
    },
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
HARMONY_MARKS: tuple[str, ...] = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)
HARMONY_CALL = (
    "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    f"<|constrain|>json<|message|>{CALL.arguments}<|call|>"
)


class Conversation:
    """A model of one family that calls a function, and a client of it."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server

    def post(self, *messages: dict[str, Any], **fields: object) -> Any:
        body = {"model": MODEL_NAME, "messages": [QUESTION, *messages], "tools": TOOLS, **fields}
        response = self._server.shared_http.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        return response

    def prompt(self) -> str:
        return self._server.engine.decode(self._server.engine.requests[-1].prompt_ids)


@pytest.fixture(scope="module", params=[*TEMPLATES, "harmony"])
def family(request: pytest.FixtureRequest) -> Iterator[Conversation]:
    template, written = HARMONY, HARMONY_CALL
    if request.param != "harmony":
        template = TEMPLATES[request.param]
        dialect = find_dialect(ChatTemplate(template), make_codec(byte_level()), end_ids=())
        written = f"I look.{dialect.tool_format.write([CALL])}"
        if dialect.tool_format.name == "pythonic":  # a call that stands behind text is text
            written = written.removeprefix("I look.")
    info = make_info(max_model_len=8192, chat_template=template, more_tokens=HARMONY_MARKS)
    with running(ScriptedEngine(written, info=info)) as server:
        yield Conversation(server)


def test_a_call_is_read_and_stands_in_the_next_prompt_before_its_result(family: Conversation) -> None:
    choice = family.post().json()["choices"][0]
    message = choice["message"]
    [call] = message["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", ARGUMENTS)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Rain from noon."}
    family.post(message, result)
    prompt = family.prompt()
    assert prompt.index(CITY) < prompt.index("Rain from noon.")
    assert "get_weather" in prompt[: prompt.index("Will it rain?")]


def test_a_stream_brings_the_same_call(family: Conversation) -> None:
    events = family.post(stream=True).text.split("\n\n")[:-2]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls") or ()]
    assert [piece["function"]["name"] for piece in pieces if piece.get("id")] == ["get_weather"]
    assert json.loads("".join(piece["function"].get("arguments") or "" for piece in pieces)) == ARGUMENTS
