"""Agents of the OpenAI Agents SDK against the server whose base URL is the first argument; writes what they did."""

import asyncio
import json
import sys

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from agents import set_tracing_disabled as disable_tracing
from openai import AsyncOpenAI
from pydantic import BaseModel

# What the tools were called with. Calls of one turn run side by side, so that reports sort them.
SEEN: list[list[object]] = []


class Report(BaseModel):
    """What the structured agent has to fill in."""

    city: str
    degrees: int


@function_tool
def weather(city: str) -> str:
    """Weather of a city."""
    SEEN.append(["weather", city])
    return f"{city}: 5 degrees"


@function_tool
def add(a: int, b: int) -> int:
    """Sum of two numbers."""
    SEEN.append(["add", a, b])
    return a + b


async def run() -> dict[str, object]:
    """What an agent does over each of the two APIs, whole, streamed and with an answer of a type."""
    client = AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
    found: dict[str, object] = {}
    for name, kind in (("chat", OpenAIChatCompletionsModel), ("responses", OpenAIResponsesModel)):
        model = kind(model="tiny", openai_client=client)
        agent = Agent("helper", instructions="Be brief.", model=model, tools=[weather, add])
        SEEN.clear()
        result = await Runner.run(agent, "How warm is it?")
        found[name] = {"calls": sorted(SEEN, key=str), "text": result.final_output}
        SEEN.clear()
        streamed = Runner.run_streamed(agent, [*result.to_input_list(), {"role": "user", "content": "And now?"}])
        async for _ in streamed.stream_events():
            pass
        found[f"{name}_streamed"] = {"calls": sorted(SEEN, key=str), "text": streamed.final_output}
        typed = Agent(
            "reporter",
            instructions="Report.",
            model=model,
            output_type=Report,
            model_settings=ModelSettings(temperature=0, max_tokens=200),
        )
        found[f"{name}_typed"] = (await Runner.run(typed, "Report.")).final_output.model_dump()
    return found


def main() -> None:
    """Run the agents."""
    disable_tracing(True)
    json.dump(asyncio.run(run()), sys.stdout)


if __name__ == "__main__":
    main()
