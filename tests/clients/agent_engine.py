"""A ScriptedEngine for agents: calls their tools, one step after the other, and then answers."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from tests.server.fakes import ScriptedEngine, make_info

Calls = Sequence[tuple[str, dict[str, Any]]]

ANSWER = "It is 5 degrees warm."
QUESTION = "How warm is it?"

# Prompts of coding agents describe many tools, and the tokenizer spells them byte by byte.
_CONTEXT = 1 << 20


def agent_engine() -> ScriptedEngine:
    """Takes the prompts of coding agents; says ANSWER."""
    return ScriptedEngine(ANSWER, info=make_info(max_model_len=_CONTEXT), chunk_sizes=(1, 16, 5, 40))


def write_calls(calls: Calls) -> str:
    """These calls as the model writes them."""
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    )


def by_turns(turns: Sequence[Calls], answer: str = ANSWER) -> Callable[[str], str]:
    """Makes the calls of each turn, then answers: how many turns are over shows behind the user's last words."""

    def say(prompt: str) -> str:
        over = _num_results(prompt)
        return write_calls(turns[over]) if over < len(turns) else answer

    return say


def _num_results(prompt: str) -> int:
    """How many messages with results of calls end the prompt."""
    over = 0
    for message in reversed(prompt.split("<user>")):
        if not message.startswith("<tool_response>"):
            break
        over += 1
    return over
