"""Agent frameworks of other makers: loops of several turns over tools, and answers of a type."""

import json
from typing import Any

import pytest

from tests.clients.agent_engine import ANSWER, by_turns, write_calls
from tests.clients.harness import needs, needs_node, run_node_script, run_script
from tests.server.harness import RunningServer

pytestmark = pytest.mark.clients

PARIS, OSLO, ADD = ("weather", {"city": "Paris"}), ("weather", {"city": "Oslo"}), ("add", {"a": 2, "b": 3})
SEEN = [["add", 2, 3], ["weather", "Oslo"], ["weather", "Paris"]]
"""What the tools are called with, sorted: calls of one turn run side by side."""

REPORT = '{"city": "Paris", "degrees": 5}'
TYPED = {"city": "Paris", "degrees": 5}

DONE = {"calls": SEEN, "text": ANSWER}


def loops_or_reports(prompt: str) -> str:
    """Two calls at once, one more behind their results, then words; and a report where one is asked for."""
    if prompt.endswith("<user>Report.\n<assistant>"):
        return write_calls([("final_result", TYPED)]) if '"name": "final_result"' in prompt else REPORT
    return by_turns([[PARIS, OSLO], [ADD]])(prompt)


@pytest.fixture
def url(agent_server: RunningServer) -> str:
    agent_server.engine.say(loops_or_reports)
    return f"{agent_server.url}/v1"


@needs("libraries")
def test_langgraph(url: str) -> None:
    found = run_script("langgraph_calls.py", url)
    assert found["chat"].pop("total_tokens") == found["responses"].pop("total_tokens") > 100
    assert found == dict.fromkeys(["chat", "chat_streamed", "responses", "responses_streamed"], DONE)


@needs("libraries")
def test_openai_agents_sdk(url: str) -> None:
    found = run_script("openai_agents_calls.py", url)
    assert found["chat"] == found["chat_streamed"] == found["responses"] == found["responses_streamed"] == DONE
    assert found["chat_typed"] == found["responses_typed"] == TYPED


@needs("libraries")
def test_pydantic_ai(url: str) -> None:
    found = run_script("pydantic_ai_calls.py", url)
    assert found["chat"] == found["responses"] == {"whole": DONE, "streamed": DONE}
    assert found["typed"] == dict.fromkeys(["NativeOutput", "PromptedOutput", "ToolOutput"], TYPED)


@needs("older_sdk")
def test_llama_index(agent_server: RunningServer) -> None:
    agent_server.engine.say(reacts)
    found = run_script("llama_index_calls.py", f"{agent_server.url}/v1", environment="older_sdk")
    assert found["chat"] == found["streamed"] == ANSWER
    assert found["completion"] == ANSWER[:12]  # of as many one-byte tokens
    assert found["FunctionAgent"] == DONE
    assert found["ReActAgent"] == {"calls": [["weather", "Paris"]], "text": ANSWER}


def reacts(prompt: str) -> str:
    """Tools by LlamaIndex's own text format where its prompt describes that."""
    if "Action Input" not in prompt:
        return by_turns([[PARIS, OSLO], [ADD]])(prompt) if "How warm is it?" in prompt else ANSWER
    if "Observation: Paris: 5 degrees" in prompt:
        return f"Thought: I can answer without using any more tools.\nAnswer: {ANSWER}"
    return 'Thought: I need a tool.\nAction: weather\nAction Input: {"city": "Paris"}'


@needs("libraries")
def test_dspy(agent_server: RunningServer) -> None:
    agent_server.engine.say(fills_in)
    found = run_script("dspy_calls.py", f"{agent_server.url}/v1")
    assert found["ChatAdapter"] == found["JSONAdapter"] == {"kind": "question", "urgent": True}
    assert found["ReAct"] == {"calls": [["weather", "Paris"]], "text": ANSWER}


def fills_in(prompt: str) -> str:
    """The fields that a DSPy program asks for, in the format that it wants."""
    if "then `answer`" in prompt:
        return f'{{"reasoning": "It was said.", "answer": "{ANSWER}"}}'
    if "`next_tool_name`" in prompt:
        if "Paris: 5 degrees" in prompt:
            return '{"next_thought": "Done.", "next_tool_name": "finish", "next_tool_args": {}}'
        return '{"next_thought": "Ask.", "next_tool_name": "weather", "next_tool_args": {"city": "Paris"}}'
    if "[[ ## completed ## ]]" in prompt:
        return "[[ ## kind ## ]]\nquestion\n\n[[ ## urgent ## ]]\nTrue\n\n[[ ## completed ## ]]"
    return '{"kind": "question", "urgent": true}'


@needs("older_sdk")
def test_instructor(agent_server: RunningServer) -> None:
    agent_server.engine.say(reports_as_told)
    found = run_script("instructor_calls.py", f"{agent_server.url}/v1", environment="older_sdk")
    report = {**TYPED, "tags": ["sun"]}
    assert found.pop("iterable") == [report]
    assert found == dict.fromkeys(found, report)
    assert len(found) > 4


def reports_as_told(prompt: str) -> str:
    """A report by the one function that is there, as JSON, or as JSON in a block of code."""
    report: dict[str, Any] = {**TYPED, "tags": ["sun"]}
    arguments = dict.fromkeys(["Report", "StrictReport", "PartialReport"], report)
    for name, filled in {**arguments, "IterableReport": {"tasks": [report]}}.items():
        if f'{{"name": "{name}", "description"' in prompt:
            return write_calls([(name, filled)])
    text = json.dumps(report)
    return f"```json\n{text}\n```" if "codeblock" in prompt else text


@needs_node()
def test_vercel_ai_sdk(url: str) -> None:
    found = run_node_script("ai_sdk.mjs", url)
    assert found.pop("typed") == dict.fromkeys(["compatible", "chat", "responses"], TYPED)
    for api in found.values():
        assert api["streamed"] == DONE
        assert {**api["whole"], "outputTokens": None} == {**DONE, "steps": 3, "outputTokens": None}
        assert api["whole"]["outputTokens"] > 0


def test_script_covers_every_turn() -> None:
    """The engine's script itself, without any client."""
    say: Any = loops_or_reports
    assert say("<user>How warm is it?\n<assistant>") == write_calls([PARIS, OSLO])
    results = "<user><tool_response>\nParis: 5 degrees\n</tool_response>\n"
    assert say(f"<user>How warm is it?\n<assistant>...\n{results}<assistant>") == write_calls([ADD])
