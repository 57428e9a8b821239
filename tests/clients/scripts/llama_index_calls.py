"""LlamaIndex against the server whose base URL is the first argument; writes what came back as JSON."""

import asyncio
import json
import sys

from llama_index.core.agent.workflow import FunctionAgent, ReActAgent
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

# What the tools were called with. Calls of one turn run side by side, so that reports sort them.
SEEN: list[list[object]] = []


def weather(city: str) -> str:
    """Weather of a city."""
    SEEN.append(["weather", city])
    return f"{city}: 5 degrees"


def add(a: int, b: int) -> int:
    """Sum of two numbers."""
    SEEN.append(["add", a, b])
    return a + b


async def run() -> dict[str, object]:
    """Complete, ask and stream, then let agents use tools: by OpenAI's calls, and by text."""
    llm = OpenAILike(
        model="tiny", api_base=sys.argv[1], api_key="none", is_chat_model=True, is_function_calling_model=True,
        max_tokens=400, max_retries=0,
    )  # fmt: skip
    plain = OpenAILike(
        model="tiny", api_base=sys.argv[1], api_key="none", is_chat_model=False, max_tokens=12, temperature=0
    )
    question = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hello")]
    *_, last = llm.stream_chat(question)
    found: dict[str, object] = {
        "chat": llm.chat(question).message.content,
        "streamed": last.message.content,
        "completion": plain.complete("Once upon").text,
    }
    for kind in (FunctionAgent, ReActAgent):
        SEEN.clear()
        agent = kind(tools=[weather, add], llm=llm, system_prompt="Be brief.")
        answer = await agent.run("How warm is it?")
        found[kind.__name__] = {"calls": sorted(SEEN, key=str), "text": answer.response.content}
    return found


def main() -> None:
    """Run the calls."""
    json.dump(asyncio.run(run()), sys.stdout)


if __name__ == "__main__":
    main()
