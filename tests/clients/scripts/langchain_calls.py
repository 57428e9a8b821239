"""Calls of LangChain against the server whose base URL is the first argument; writes what came back as JSON."""

import asyncio
import json
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

# The answer may hold one number only, so that a model that knows nothing can give it.
COUNT = {
    "title": "count",
    "description": "Count.",
    "type": "object",
    "properties": {"n": {"enum": [7]}},
    "required": ["n"],
    "additionalProperties": False,
}


def main() -> None:
    """Ask, stream, batch, and ask asynchronously."""
    common = {"base_url": sys.argv[1], "api_key": "none", "model": "tiny", "temperature": 0, "max_tokens": 12}
    chat = ChatOpenAI(**common, max_retries=0)
    messages = [SystemMessage("Be brief."), HumanMessage("Hello")]
    whole = chat.invoke(messages)
    roomy = ChatOpenAI(**{**common, "max_tokens": 100})
    found = {
        "text": whole.content,
        "usage": whole.usage_metadata,
        "streamed": "".join(str(chunk.content) for chunk in chat.stream(messages)),
        "batched": [answer.content for answer in chat.batch([messages, messages])],
        "awaited": asyncio.run(chat.ainvoke(messages)).content,
        "logprobs": len(
            chat.bind(logprobs=True, top_logprobs=2).invoke(messages).response_metadata["logprobs"]["content"]
        ),
        "structured": roomy.with_structured_output(COUNT, method="json_schema", strict=True).invoke(messages),
        "calls": roomy.bind_tools([COUNT], tool_choice="required", parallel_tool_calls=False)
        .invoke(messages)
        .tool_calls,
        "responses": ChatOpenAI(**common, use_responses_api=True).invoke("Hello").text,
        "completion": OpenAI(**common).invoke("Once upon"),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
