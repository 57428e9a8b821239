"""Pydantic AI agents against the server whose base URL is the first argument; writes what they did as JSON."""

import asyncio
import json
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Report(BaseModel):
    """What a structured agent has to fill in."""

    city: str
    degrees: int


async def use_tools(model: object) -> dict[str, object]:
    """What an agent with tools does, whole and then streamed with the messages of the first run before it."""
    seen: list[list[object]] = []
    agent = Agent(model, system_prompt="Be brief.")

    @agent.tool_plain
    def weather(city: str) -> str:
        """Weather of a city."""
        seen.append(["weather", city])
        return f"{city}: 5 degrees"

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        """Sum of two numbers."""
        seen.append(["add", a, b])
        return a + b

    result = await agent.run("How warm is it?")
    whole = {"calls": sorted(seen, key=str), "text": result.output}
    seen.clear()
    async with agent.run_stream("And now?", message_history=result.all_messages()) as stream:
        text = await stream.get_output()
    return {"whole": whole, "streamed": {"calls": sorted(seen, key=str), "text": text}}


async def run() -> dict[str, object]:
    """Tools over both APIs, and an answer of a type in every way that Pydantic AI has."""
    provider = OpenAIProvider(base_url=sys.argv[1], api_key="none")
    chat, responses = OpenAIChatModel("tiny", provider=provider), OpenAIResponsesModel("tiny", provider=provider)
    typed = {}
    for kind in (NativeOutput, PromptedOutput, ToolOutput):
        agent = Agent(chat, output_type=kind(Report))
        typed[kind.__name__] = (await agent.run("Report.")).output.model_dump()
    return {"chat": await use_tools(chat), "responses": await use_tools(responses), "typed": typed}


def main() -> None:
    """Run the agents."""
    json.dump(asyncio.run(run()), sys.stdout)


if __name__ == "__main__":
    main()
