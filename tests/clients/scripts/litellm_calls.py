"""Calls of LiteLLM against the server whose base URL is the first argument; writes what came back as JSON."""

import json
import sys

import litellm


def main() -> None:
    """Ask, stream, complete, and be refused."""
    common = {"model": "openai/tiny", "api_base": sys.argv[1], "api_key": "none", "temperature": 0, "max_tokens": 12}
    messages = [{"role": "user", "content": "Hello"}]
    whole = litellm.completion(messages=messages, **common)
    chunks = litellm.completion(messages=messages, stream=True, **common)
    try:
        litellm.completion(messages=messages, **{**common, "temperature": -1})
        refusal = None
    except litellm.BadRequestError as error:
        refusal = error.status_code
    found = {
        "text": whole.choices[0].message.content,
        "total_tokens": whole.usage.total_tokens,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "completion": litellm.text_completion(prompt="Once upon", **{**common, "model": "text-completion-openai/tiny"})
        .choices[0]
        .text,
        "refusal": refusal,
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
