"""DSPy programs against the server whose base URL is the first argument; writes what they did as JSON."""

import json
import sys
from typing import Literal

import dspy

SEEN: list[list[object]] = []


class Sort(dspy.Signature):
    """Sort a message."""

    message: str = dspy.InputField()
    kind: Literal["question", "complaint"] = dspy.OutputField()
    urgent: bool = dspy.OutputField()


def weather(city: str) -> str:
    """Weather of a city."""
    SEEN.append(["weather", city])
    return f"{city}: 5 degrees"


def main() -> None:
    """Predict by text markers and by JSON, and act."""
    lm = dspy.LM("openai/tiny", api_base=sys.argv[1], api_key="none", cache=False, max_tokens=400, num_retries=0)
    found = {}
    for adapter in (dspy.ChatAdapter(use_json_adapter_fallback=False), dspy.JSONAdapter()):
        with dspy.context(lm=lm, adapter=adapter):
            answer = dspy.Predict(Sort)(message="Where is it?")
        found[type(adapter).__name__] = {"kind": answer.kind, "urgent": answer.urgent}
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter(use_native_function_calling=False)):
        found["ReAct"] = {"text": dspy.ReAct("question -> answer", tools=[weather])(question="How warm?").answer}
    found["ReAct"]["calls"] = SEEN
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
