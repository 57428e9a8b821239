"""Answers of a type by agent frameworks, from the server whose base URL is the first argument; writes them as JSON."""

import asyncio
import json
import sys
from typing import Literal

from agents import Agent as OpenAIAgent
from agents import ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "Count."


class Count(BaseModel):
    """One number is allowed, so that a model that knows nothing can give it."""

    model_config = ConfigDict(extra="forbid")

    n: Literal[7]


async def by_openai_agents() -> dict[str, Count]:
    """By both APIs."""
    client = AsyncOpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
    settings = ModelSettings(max_tokens=100)
    found = {}
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model="tiny", openai_client=client)
        agent = OpenAIAgent("counter", instructions="Count.", model=model, output_type=Count, model_settings=settings)
        found[kind.__name__] = (await Runner.run(agent, QUESTION)).final_output
    return found


async def by_pydantic_ai() -> dict[str, Count]:
    """By a form of the answer, and by a call that is required."""
    model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=sys.argv[1], api_key="none"))
    found = {}
    for kind in (NativeOutput, ToolOutput):
        agent = Agent(model, output_type=kind(Count), model_settings={"max_tokens": 100})
        found[kind.__name__] = (await agent.run(QUESTION)).output
    return found


def by_langgraph() -> dict[str, Count]:
    """By a form of the answer, and by a call that is required."""
    model = ChatOpenAI(base_url=sys.argv[1], api_key="none", model="tiny", max_tokens=100)
    question = {"messages": [{"role": "user", "content": QUESTION}]}
    found = {}
    for strategy in (ProviderStrategy, ToolStrategy):
        agent = create_agent(model, response_format=strategy(Count))
        found[strategy.__name__] = agent.invoke(question)["structured_response"]
    return found


async def run() -> dict[str, Count]:
    """All of them."""
    return {**await by_openai_agents(), **await by_pydantic_ai(), **by_langgraph()}


def main() -> None:
    """Write what came back."""
    set_tracing_disabled(True)
    json.dump({name: count.model_dump() for name, count in asyncio.run(run()).items()}, sys.stdout)


if __name__ == "__main__":
    main()
