"""Function tools in /v1/responses: the official client against a server whose engine answers with scripted calls."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import FunctionToolParam, ResponseFunctionToolCall, ResponseInputParam
from pydantic import BaseModel

from cllm_core.text.tools.formats import DEFAULT_FORMAT
from cllm_core.text.tools.functions import FunctionCall
from tests.server.fakes import MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running

RESPONSES = "/v1/responses"

WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": None,
}
TIME: FunctionToolParam = {"type": "function", "name": "get_time", "parameters": None, "strict": True}

CALLS = [FunctionCall("get_weather", '{"city": "Köln"}'), FunctionCall("get_time", "{}")]
WRITTEN = DEFAULT_FORMAT.write(CALLS)
SAID = "Let me see."


class GetWeather(BaseModel):
    """Arguments of a call, parsed by the client."""

    city: str


@pytest.fixture(scope="module")
def caller() -> Iterator[RunningServer]:
    """Says something, then calls two functions."""
    with running(ScriptedEngine(f"{SAID}\n{WRITTEN}", info=make_info(max_model_len=4096))) as server:
        yield server


@pytest.fixture(scope="module")
def silent() -> Iterator[RunningServer]:
    """Calls two functions and says nothing."""
    with running(ScriptedEngine(WRITTEN, info=make_info(max_model_len=4096))) as server:
        yield server


def calls_of(response: openai.types.responses.Response) -> list[ResponseFunctionToolCall]:
    return [item for item in response.output if isinstance(item, ResponseFunctionToolCall)]


def prompt_of(server: RunningServer) -> str:
    return server.engine.decode(server.engine.requests[-1].prompt_ids)


def test_the_official_client_reads_text_and_calls(caller: RunningServer) -> None:
    response = caller.openai().responses.create(model=MODEL_NAME, input="Hi", tools=[WEATHER, TIME])
    assert (response.output_text, response.status) == (SAID, "completed")
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
    assert [(call.name, call.arguments, call.status) for call in calls_of(response)] == [
        (call.name, call.arguments, "completed") for call in CALLS
    ]
    assert len({call.call_id for call in calls_of(response)}) == 2


def test_calls_alone_come_without_a_message(silent: RunningServer) -> None:
    response = silent.openai().responses.create(model=MODEL_NAME, input="Hi", tools=[WEATHER, TIME])
    assert [item.type for item in response.output] == ["function_call", "function_call"]


def test_the_response_says_which_tools_it_was_offered(silent: RunningServer) -> None:
    choice: Any = {"type": "function", "name": "get_time"}
    response = silent.openai().responses.create(
        model=MODEL_NAME, input="Hi", tools=[WEATHER, TIME], tool_choice=choice, parallel_tool_calls=False
    )
    assert [tool.to_dict() for tool in response.tools] == [
        WEATHER,
        {"type": "function", "name": "get_time", "description": None, "parameters": None, "strict": True},
    ]
    assert not isinstance(response.tool_choice, str)
    assert response.tool_choice.to_dict() == choice
    assert response.parallel_tool_calls is False


@pytest.mark.parametrize("says_something", [True, False])
def test_events_of_calls_come_in_the_documented_order(
    caller: RunningServer, silent: RunningServer, says_something: bool
) -> None:
    server = caller if says_something else silent
    events = list(server.openai().responses.create(model=MODEL_NAME, input="Hi", tools=[WEATHER, TIME], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events if not event.type.endswith(".delta")]
    message = [
        "output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done",
    ]  # fmt: skip
    call = ["output_item.added", "function_call_arguments.done", "output_item.done"]
    assert kinds == ["created", "in_progress", *(message if says_something else []), *call, *call, "completed"]


def test_items_of_a_stream_are_told_apart_by_index_and_id(caller: RunningServer) -> None:
    events = list(caller.openai().responses.create(model=MODEL_NAME, input="Hi", tools=[WEATHER, TIME], stream=True))
    items = [event.item for event in events if event.type == "response.output_item.done"]
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    for index, call in enumerate(CALLS, start=1):
        mine = [event for event in deltas if event.output_index == index]
        assert {event.item_id for event in mine} == {items[index].id}
        assert "".join(event.delta for event in mine) == call.arguments
    assert [event.arguments for event in done] == [call.arguments for call in CALLS]
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output == items


def test_the_stream_helper_assembles_the_calls(caller: RunningServer) -> None:
    tools = [openai.pydantic_function_tool(GetWeather, name="get_weather")["function"]]
    flat: Any = [{"type": "function", **tool} for tool in tools]
    with caller.openai().responses.stream(model=MODEL_NAME, input="Hi", tools=[*flat, TIME]) as stream:
        response = stream.get_final_response()
    assert [(call.name, call.arguments) for call in calls_of(response)] == [
        (call.name, call.arguments) for call in CALLS
    ]


def test_output_and_results_go_back_as_input(caller: RunningServer) -> None:
    client = caller.openai()
    response = client.responses.create(model=MODEL_NAME, input="Hi", tools=[WEATHER, TIME])
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": output}
        for call, output in zip(calls_of(response), ("rain", [{"type": "input_text", "text": "noon"}]), strict=True)
    ]
    conversation: Any = [{"role": "user", "content": "Hi"}, *response.output, *results]
    client.responses.create(model=MODEL_NAME, input=conversation)
    assert prompt_of(caller) == (
        f"<user>Hi\n<assistant>{SAID}\n{WRITTEN}\n"
        "<user><tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>\n<assistant>"
    )


def test_calls_without_a_message_before_them_are_an_answer_of_their_own(silent: RunningServer) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "get_time", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "noon"}
    conversation: ResponseInputParam = [{"role": "user", "content": "Hi"}, call, result]  # type: ignore[list-item]
    silent.openai().responses.create(model=MODEL_NAME, input=conversation)
    assert f"<user>Hi\n<assistant>{DEFAULT_FORMAT.write([CALLS[1]])}\n<user><tool_response>\nnoon" in prompt_of(silent)


@pytest.mark.parametrize("stream", [False, True])
def test_only_the_last_item_of_a_cut_answer_is_incomplete(caller: RunningServer, stream: bool) -> None:
    body = {"model": MODEL_NAME, "input": "Hi", "tools": [WEATHER, TIME], "max_output_tokens": 75, "stream": stream}
    text = caller.shared_http.post(RESPONSES, json=body).text
    response = json.loads(text.split("data: ")[-1])["response"] if stream else json.loads(text)
    message, call = response["output"]
    assert (response["status"], message["status"], call["status"]) == ("incomplete", "completed", "incomplete")
    assert '{"city": "Köln"}'.startswith(call["arguments"])


@pytest.mark.parametrize(
    ("choice", "takes_text"),
    [
        ("auto", True),
        ("required", False),
        ({"type": "function", "name": "get_time"}, False),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]}, True),
    ],
)
def test_the_choice_binds_the_output(silent: RunningServer, choice: Any, takes_text: bool) -> None:
    silent.openai().responses.create(model=MODEL_NAME, input="Hi", tools=[WEATHER, TIME], tool_choice=choice)
    grammar = silent.engine.requests[-1].params.grammar
    assert grammar is not None
    assert ("TEXT" in grammar) == takes_text
