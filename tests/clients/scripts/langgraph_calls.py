"""A LangGraph agent against the server whose base URL is the first argument; writes what it did as JSON."""

import json
import sys

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

# What the tools were called with. Calls of one turn run side by side, so that reports sort them.
SEEN: list[list[object]] = []


@tool
def weather(city: str) -> str:
    """Weather of a city."""
    SEEN.append(["weather", city])
    return f"{city}: 5 degrees"


@tool
def add(a: int, b: int) -> int:
    """Sum of two numbers."""
    SEEN.append(["add", a, b])
    return a + b


def main() -> None:
    """Let the agent use its tools, by chat completions and by responses, whole and streamed."""
    question = {"messages": [{"role": "user", "content": "How warm is it?"}]}
    found = {}
    for name, responses in (("chat", False), ("responses", True)):
        model = ChatOpenAI(base_url=sys.argv[1], api_key="none", model="tiny", use_responses_api=responses)
        agent = create_agent(model, [weather, add], system_prompt="Be brief.")
        SEEN.clear()
        answer = agent.invoke(question)["messages"][-1]
        found[name] = {
            "calls": sorted(SEEN, key=str),
            "text": answer.text,
            "total_tokens": answer.usage_metadata["total_tokens"],
        }
        SEEN.clear()
        chunks = [
            chunk for chunk, _ in agent.stream(question, stream_mode="messages") if chunk.type == "AIMessageChunk"
        ]
        found[f"{name}_streamed"] = {"calls": sorted(SEEN, key=str), "text": "".join(chunk.text for chunk in chunks)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
