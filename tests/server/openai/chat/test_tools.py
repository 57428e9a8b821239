"""Tools in chat completions: the official client against a server whose engine answers with scripted calls."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from cllm_core.text.tools.formats import DEFAULT_FORMAT
from cllm_core.text.tools.functions import FunctionCall
from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running

CHAT = "/v1/chat/completions"
RENDER = "/v1/chat/completions/render"
LONG_CONTEXT = 4096

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
PARAMETERS: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
}
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells the weather.", "parameters": PARAMETERS},
}
TIME: ChatCompletionToolParam = {"type": "function", "function": {"name": "get_time"}}

ARGUMENTS = '{"city": "Köln \\"<tool_call>\\"", "unit": "C"}'
CALLS = [FunctionCall("get_weather", ARGUMENTS), FunctionCall("get_time", "{}")]
WRITTEN = DEFAULT_FORMAT.write(CALLS)
SAID = "Let me see."


class GetWeather(BaseModel):
    """Arguments of a call, parsed by the client."""

    city: str
    unit: Literal["C", "F"]


def make_engine(answer: str, **options: Any) -> ScriptedEngine:
    return ScriptedEngine(answer, info=make_info(max_model_len=LONG_CONTEXT), **options)


@pytest.fixture(scope="module")
def caller() -> Iterator[RunningServer]:
    """Says something, then calls two functions."""
    with running(make_engine(f"{SAID}\n{WRITTEN}")) as server:
        yield server


@pytest.fixture(scope="module")
def silent() -> Iterator[RunningServer]:
    """Calls two functions and says nothing."""
    with running(make_engine(WRITTEN)) as server:
        yield server


@pytest.fixture(scope="module")
def talker() -> Iterator[RunningServer]:
    """Calls nothing."""
    with running(make_engine(ANSWER)) as server:
        yield server


def post(server: RunningServer, path: str = CHAT, **fields: object) -> Any:
    body = {"model": MODEL_NAME, "messages": HELLO, "tools": [WEATHER, TIME], **fields}
    response = server.shared_http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(server: RunningServer, **fields: object) -> list[Any]:
    body = {"model": MODEL_NAME, "messages": HELLO, "tools": [WEATHER, TIME], "stream": True, **fields}
    text = server.shared_http.post(CHAT, json=body).text
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]


def grammar_of(server: RunningServer) -> str:
    grammar = server.engine.requests[-1].params.grammar
    assert grammar is not None
    return grammar


def prompt_of(server: RunningServer) -> str:
    return server.engine.decode(server.engine.requests[-1].prompt_ids)


def test_the_official_client_reads_calls(caller: RunningServer) -> None:
    completion = caller.openai().chat.completions.create(model=MODEL_NAME, messages=HELLO, tools=[WEATHER, TIME])
    choice = completion.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", SAID)
    calls = choice.message.tool_calls or []
    assert [(call.type, call.function.name, call.function.arguments) for call in calls if call.type == "function"] == [
        ("function", call.name, call.arguments) for call in CALLS
    ]
    assert len({call.id for call in calls}) == 2
    assert all(call.id.startswith("call_") for call in calls)


def test_content_is_null_where_there_are_only_calls(silent: RunningServer) -> None:
    message = post(silent)["choices"][0]["message"]
    assert message["content"] is None
    assert len(message["tool_calls"]) == 2


def test_an_answer_without_calls_has_none(talker: RunningServer) -> None:
    choice = post(talker)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")
    assert "tool_calls" not in choice["message"]


def test_a_streamed_call_is_told_as_openai_tells_it(silent: RunningServer) -> None:
    chunks = [chunk["choices"][0] for chunk in stream(silent)]
    first, *rest = [chunk["delta"] for chunk in chunks]
    assert first == {"role": "assistant", "content": None}
    *deltas, last = [delta.get("tool_calls") for delta in rest]
    assert last is None
    assert all(len(delta) == 1 for delta in deltas)
    begun = [delta[0] for delta in deltas if "id" in delta[0]]
    assert [(call["index"], call["type"], call["function"]) for call in begun] == [
        (0, "function", {"name": "get_weather", "arguments": ""}),
        (1, "function", {"name": "get_time", "arguments": ""}),
    ]
    more = [delta[0] for delta in deltas if "id" not in delta[0]]
    assert all(call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"} for call in more)
    assert "".join(call["function"]["arguments"] for call in more if call["index"] == 0) == ARGUMENTS
    assert [chunk["finish_reason"] for chunk in chunks[-2:]] == [None, "tool_calls"]
    assert chunks[-1]["delta"] == {}


@pytest.mark.parametrize("chunk_sizes", [(1,), (7, 2), (300,)])
def test_the_stream_helper_assembles_what_comes_whole(chunk_sizes: tuple[int, ...]) -> None:
    with running(make_engine(f"{SAID}\n{WRITTEN}", chunk_sizes=chunk_sizes)) as server:
        client = server.openai()
        with client.chat.completions.stream(model=MODEL_NAME, messages=HELLO, tools=[WEATHER, TIME]) as events:
            done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
            choice = events.get_final_completion().choices[0]
    assert [(event.name, event.arguments) for event in done] == [(call.name, call.arguments) for call in CALLS]
    assert (choice.message.content, choice.finish_reason) == (SAID, "tool_calls")
    assert [call.function.name for call in choice.message.tool_calls or []] == [call.name for call in CALLS]


def test_arguments_are_parsed_into_the_clients_models(silent: RunningServer) -> None:
    strict_time: ChatCompletionToolParam = {"type": "function", "function": {"name": "get_time", "strict": True}}
    tools = [openai.pydantic_function_tool(GetWeather, name="get_weather"), strict_time]
    completion = silent.openai().chat.completions.parse(model=MODEL_NAME, messages=HELLO, tools=tools)
    call = (completion.choices[0].message.tool_calls or [])[0]
    assert call.function.parsed_arguments == GetWeather(city='Köln "<tool_call>"', unit="C")


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_goes_back_with_the_results_of_its_calls(caller: RunningServer, streams: bool) -> None:
    client = caller.openai()
    if streams:
        with client.chat.completions.stream(model=MODEL_NAME, messages=HELLO, tools=[WEATHER, TIME]) as events:
            message: Any = events.get_final_completion().choices[0].message
    else:
        completion = client.chat.completions.create(model=MODEL_NAME, messages=HELLO, tools=[WEATHER, TIME])
        message = completion.choices[0].message
    results: Any = [
        {"role": "tool", "tool_call_id": call.id, "content": f"result {index}"}
        for index, call in enumerate(message.tool_calls)
    ]
    client.chat.completions.create(model=MODEL_NAME, messages=[*HELLO, message, *results])
    assert prompt_of(caller) == (
        f"<user>Hello\n<assistant>{SAID}\n{WRITTEN}\n"
        "<user><tool_response>\nresult 0\n</tool_response>\n<tool_response>\nresult 1\n</tool_response>\n<assistant>"
    )


@pytest.mark.parametrize(
    ("choice", "takes_text", "names"),
    [
        (None, True, {"get_weather", "get_time"}),
        ("auto", True, {"get_weather", "get_time"}),
        ("required", False, {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, False, {"get_time"}),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TIME]}}, True, {"get_time"}),
    ],
)
def test_the_choice_binds_the_output_and_the_model_is_told_of_all(
    silent: RunningServer, choice: object, takes_text: bool, names: set[str]
) -> None:
    post(silent, tool_choice=choice)
    grammar = grammar_of(silent)
    assert ("TEXT" in grammar) == takes_text
    assert {name for name in ("get_weather", "get_time") if name in grammar} == names
    assert all(name in prompt_of(silent) for name in ("get_weather", "get_time"))


@pytest.mark.parametrize(
    ("fields", "is_parallel"),
    [
        ({}, True),
        ({"parallel_tool_calls": True, "tool_choice": "required"}, True),
        ({"parallel_tool_calls": False}, False),
        ({"tool_choice": {"type": "function", "function": {"name": "get_time"}}}, False),
    ],
)
def test_calls_follow_each_other_unless_one_is_wanted(
    silent: RunningServer, fields: dict[str, Any], is_parallel: bool
) -> None:
    post(silent, **fields)
    assert (" call){0," in grammar_of(silent)) == is_parallel


def test_with_no_tools_to_call_nothing_is_described_forced_or_read(silent: RunningServer) -> None:
    message = post(silent, tool_choice="none")["choices"][0]["message"]
    assert message == {"role": "assistant", "content": WRITTEN, "refusal": None}
    assert silent.engine.requests[-1].params.grammar is None
    assert prompt_of(silent) == "<user>Hello\n<assistant>"


def test_render_shows_the_prompt_with_its_tools(silent: RunningServer) -> None:
    rendered = post(silent, RENDER)["prompt"]
    post(silent)
    assert rendered == prompt_of(silent)
    assert "Tells the weather." in rendered


def test_every_choice_has_its_own_calls(silent: RunningServer) -> None:
    chunks = [chunk["choices"][0] for chunk in stream(silent, n=2)]
    for index in (0, 1):
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        begun = [call for chunk in mine for call in chunk["delta"].get("tool_calls", []) if "id" in call]
        assert [call["index"] for call in begun] == [0, 1]
        assert mine[-1]["finish_reason"] == "tool_calls"


def test_stop_strings_end_what_is_said_and_no_call(caller: RunningServer) -> None:
    message = post(caller, stop=["Köln", "see"])["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Let me ", "refusal": None}
    assert len(post(caller, stop=["Köln", "name"])["choices"][0]["message"]["tool_calls"]) == 2


def test_logprobs_are_those_of_the_content_and_usage_counts_all(caller: RunningServer) -> None:
    completion = post(caller, logprobs=True)
    entries = completion["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == SAID
    assert completion["usage"]["completion_tokens"] == len(caller.engine.answer_ids) + 1


def test_a_cut_answer_has_the_beginning_of_its_call(silent: RunningServer) -> None:
    choice = post(silent, max_tokens=60)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "length"
    assert ARGUMENTS.startswith(call["function"]["arguments"])
    nothing = post(silent, max_tokens=20)["choices"][0]["message"]
    assert "tool_calls" not in nothing


@pytest.mark.parametrize("tool_format", ["hermes", "llama3"])
def test_a_required_call_that_is_cut_before_its_name_is_left_out(tool_format: str) -> None:
    written = '{"name": "get_time", "parameters": {}}' if tool_format == "llama3" else WRITTEN
    with running(make_engine(written), tool_call_format=tool_format) as server:
        choice = post(server, tool_choice="required", max_tokens=8, logprobs=True)["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": "", "refusal": None}
        assert (choice["finish_reason"], choice["logprobs"]["content"]) == ("length", [])
        cut_mark = post(server, max_tokens=8)["choices"][0]["message"]["content"]
        assert written.startswith(cut_mark), "nothing tells it from a text that ends like this"


def test_drafts_and_token_ids_come_with_calls(caller: RunningServer) -> None:
    chunks = stream(caller, return_token_ids=True, stream_options={"include_draft": True})
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [token_id for choice in choices for token_id in choice["token_ids"]][:-1] == caller.engine.answer_ids
    assert choices[0]["draft"] != ""
    assert {choice["draft"] for choice in choices if choice["delta"].get("tool_calls")} == {""}


def test_a_format_may_be_chosen() -> None:
    answer = '{"name": "get_time", "parameters": {}}'
    with running(make_engine(answer), tool_call_format="llama3") as server:
        (call,) = post(server)["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "get_time", "arguments": "{}"}
        body = {"model": MODEL_NAME, "messages": HELLO, "tools": [TIME], "response_format": {"type": "json_object"}}
        assert server.shared_http.post(CHAT, json=body).json()["error"]["param"] == "response_format"


def test_a_call_out_of_format_is_an_error_and_no_answer() -> None:
    with running(make_engine('<tool_call>{"name"')) as server:
        body = {"model": MODEL_NAME, "messages": HELLO, "tools": [TIME]}
        response = server.shared_http.post(CHAT, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_failed")
        assert server.in_loop(lambda: server.engine.num_open) == 0


def test_a_schema_that_cannot_be_enforced_is_refused_only_where_it_is_strict(silent: RunningServer) -> None:
    odd = {"name": "odd", "parameters": {"type": "object", "propertyNames": {"minLength": 2}}}
    for strict, status in ((None, 200), (True, 400)):
        tools = [{"type": "function", "function": {**odd, "strict": strict}}]
        response = silent.shared_http.post(CHAT, json={"model": MODEL_NAME, "messages": HELLO, "tools": tools})
        assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == "tools"


@pytest.mark.parametrize("bad", ["tools", "response_format"])
def test_of_tools_and_a_form_the_one_that_cannot_be_enforced_is_named(silent: RunningServer, bad: str) -> None:
    odd = {"type": "object", "propertyNames": {"minLength": 2}}
    fine: dict[str, object] = {"type": "object"}
    function = {"name": "f", "strict": True, "parameters": odd if bad == "tools" else fine}
    schema = {"name": "x", "strict": True, "schema": odd if bad == "response_format" else fine}
    body = {
        "model": MODEL_NAME,
        "messages": HELLO,
        "tools": [{"type": "function", "function": function}],
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    response = silent.shared_http.post(CHAT, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, bad)


@pytest.mark.parametrize("pattern", ["(", "(?=a)"])
def test_patterns_that_no_grammar_can_follow_are_refused(silent: RunningServer, pattern: str) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}, "required": ["x"]}
    body = {"model": MODEL_NAME, "messages": HELLO, "tool_choice": "required"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}]
    response = silent.shared_http.post(CHAT, json={**body, "tools": tools})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
