"""How calls of functions look in a model's text: one ToolFormat per family of models, each a skeleton of fixed strings.

    content, first, call, next, call, ..., last            call = NAME between ARGUMENTS after
    Sure. <tool_call>{"name": "f", "arguments": {...}}</tool_call>

NAME is a function's name, ARGUMENTS are written in the format's style, all else is the format's. Whoever writes calls
into a prompt, forces a model to write them (`grammar`) or reads them (`reader`) takes the strings from here. The
formats themselves are in `formats`.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from cllm_core.text.provenance import concat, from_client, from_template
from cllm_core.text.tools.arguments import ArgumentStyle, JsonArguments
from cllm_core.text.tools.functions import FunctionCall

ToolFormatName = Literal[
    "hermes",
    "llama3",
    "mistral",
    "qwen3_coder",
    "seed_oss",
    "minimax_m2",
    "glm45",
    "deepseek_v3",
    "pythonic",
    "olmo3",
    "granite",
    "phi4_mini",
    "harmony",
]
ToolFormatChoice = Literal["auto", ToolFormatName]

WHITE_SPACE = " \t\r\n"
"""What may stand before calls and is part of neither them nor the text."""

MAX_CALLS = 32
"""Most calls of one output: a model that has to call something might go on for ever."""


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The fixed strings around the calls in a text.

    Attributes:
        marker: begins `first` and marks the beginning of calls wherever it stands; None where only the start of a text
            can be a call, which is then recognised by `first` and the name of a known function.
        template_pattern: regex; it is found in the chat templates that write calls in this format.
        style: of the arguments.
        tokens: strings in the format that many vocabularies have as tokens of their own.
        has_short_ids: the chat templates refuse ids of calls that are not nine letters or digits.
        has_channels: reasoning, content and calls are messages of their own, on channels (`harmony`).
    """

    name: ToolFormatName
    first: str
    between: str
    after: str
    next: str
    last: str = ""
    marker: str | None
    template_pattern: str
    style: ArgumentStyle = JsonArguments()
    tokens: tuple[str, ...] = ()
    has_short_ids: bool = False
    has_channels: bool = False

    def markers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Strings that mark the beginning of calls of these functions; none is the beginning of another."""
        # The first character behind the name tells "get" from "get_weather".
        return (self.marker,) if self.marker is not None else tuple(self.opening(name) for name in names)

    def opening(self, name: str) -> str:
        """The beginning of calls whose first is of this function, to the character behind its name."""
        return self.first + name + self.between[0]

    def write(self, calls: Sequence[FunctionCall]) -> str:
        """The calls, at least one, as a model would write them; arguments that were cut are written as they are.

        The fixed strings are marked as a template's own text, the rest as the client's: in a prompt only the former
        can be control tokens.
        """
        bodies = [concat([from_client(call.name), self.between, self._arguments(call), self.after]) for call in calls]
        return concat([self.first, from_template(self.next).join(bodies), self.last])

    def _arguments(self, call: FunctionCall) -> str:
        try:
            return from_client(self.style.write(call.arguments))
        except ValueError:
            return from_client(call.arguments)
