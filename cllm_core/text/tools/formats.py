"""How calls of functions look in a model's text: one ToolFormat per family of models, each a skeleton of fixed strings.

    content, first, call, next, call, ..., last            call = NAME between ARGUMENTS after
    Sure. <tool_call>{"name": "f", "arguments": {...}}</tool_call>

NAME is a function's name, ARGUMENTS one JSON object, all else is the format's. Whoever writes calls into a prompt,
forces a model to write them (`grammar`) or reads them (`reader`) takes the strings from here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

ToolFormatName = Literal["hermes", "llama3", "mistral"]
ToolFormatChoice = Literal["auto", "hermes", "llama3", "mistral"]

NAME_PATTERN = r"[A-Za-z0-9_-]{1,64}"
"""Of functions, as OpenAI documents it."""


WHITE_SPACE = " \t\r\n"
"""What may stand before calls and is part of neither them nor the text."""


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the client offers.

    Attributes:
        parameters: JSON schema of the object that holds its arguments; None where it has none.
        is_strict: the schema must be one that can be enforced whole, else what cannot be is left to the model.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, object] | None = None
    is_strict: bool = False

    def as_tool(self) -> dict[str, object]:
        """The function in OpenAI's words, which chat templates expect; many count on parameters."""
        description = {} if self.description is None else {"description": self.description}
        parameters = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": {"name": self.name, **description, "parameters": parameters}}


class FunctionCall(msgspec.Struct, frozen=True):
    """A call of a function; `arguments` is the text of a JSON object, incomplete where the output was cut."""

    name: str
    arguments: str


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The fixed strings around the calls in a text.

    Attributes:
        marker: begins `first` and marks the beginning of calls wherever it stands; None where only the start of a text
            can be a call, which is then told by `first` and the name of a known function.
        template_pattern: regex; it is found in the chat templates that write calls in this format.
        tokens: strings in the format that many vocabularies have as tokens of their own.
        has_short_ids: the chat templates refuse ids of calls that are not nine letters or digits.
    """

    name: ToolFormatName
    first: str
    between: str
    after: str
    next: str
    last: str = ""
    marker: str | None
    template_pattern: str
    tokens: tuple[str, ...] = ()
    has_short_ids: bool = False

    def markers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Strings that mark the beginning of calls of these functions; none is the beginning of another."""
        # The first character behind the name tells "get" from "get_weather".
        return (self.marker,) if self.marker is not None else tuple(self.opening(name) for name in names)

    def opening(self, name: str) -> str:
        """The beginning of calls whose first is of this function, to the character behind its name."""
        return self.first + name + self.between[0]

    def write(self, calls: Sequence[FunctionCall]) -> str:
        """The calls, at least one, as a model would write them."""
        bodies = [call.name + self.between + call.arguments + self.after for call in calls]
        return self.first + self.next.join(bodies) + self.last


_HERMES = ToolFormat(
    name="hermes",
    first='<tool_call>\n{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
    next='\n<tool_call>\n{"name": "',
    marker="<tool_call>",
    # Others put XML between these marks.
    template_pattern=r'<tool_call>(?s:.*)arguments\\?":',
    tokens=("<tool_call>", "</tool_call>"),
)

_LLAMA3 = ToolFormat(
    name="llama3",
    first='{"name": "',
    between='", "parameters": ',
    after="}",
    next='; {"name": "',
    marker=None,
    # `ipython` is what this family calls the role of tools.
    template_pattern=r'ipython(?s:.*)parameters\\?":',
)

_MISTRAL = ToolFormat(
    name="mistral",
    first='[TOOL_CALLS] [{"name": "',
    between='", "arguments": ',
    after="}",
    next=', {"name": "',
    last="]",
    marker="[TOOL_CALLS]",
    template_pattern=r"\[TOOL_CALLS\]",
    tokens=("[TOOL_CALLS]",),
    has_short_ids=True,
)

_MISTRAL_NEMO = msgspec.structs.replace(
    _MISTRAL, first=_MISTRAL.first.replace("] [", "]["), template_pattern=r"\[TOOL_CALLS\]\["
)

_MISTRAL_ARGS = msgspec.structs.replace(
    _MISTRAL,
    first="[TOOL_CALLS]",
    between="[ARGS]",
    after="",
    next="[TOOL_CALLS]",
    last="",
    template_pattern=r"\[TOOL_CALLS\](?s:.*)\[ARGS\]",
    tokens=("[TOOL_CALLS]", "[ARGS]"),
)

# The first that a template shows is taken, so the narrower pattern stands first.
FORMATS = (_MISTRAL_ARGS, _MISTRAL_NEMO, _MISTRAL, _HERMES, _LLAMA3)

_DEFAULTS: Mapping[ToolFormatName, ToolFormat] = {"hermes": _HERMES, "llama3": _LLAMA3, "mistral": _MISTRAL}


def find_format(chosen: ToolFormatChoice, template: str | None) -> ToolFormat | None:
    """The format of that name, or with "auto" the one that the chat template's source shows; None where it shows none.

    A family's formats differ in details that the template decides in either case.
    """
    shown = (form for form in FORMATS if template is not None and re.search(form.template_pattern, template))
    found = next((form for form in shown if chosen in ("auto", form.name)), None)
    if found is not None or chosen == "auto":
        return found
    return _DEFAULTS[chosen]


DEFAULT_FORMAT = _HERMES
"""For models that know no format: the one with the clearest marks."""


def parse_arguments(text: str) -> dict[str, object]:
    """The arguments of a call, none in an empty text; ValueError where the text is no JSON object."""
    if not text:
        return {}
    try:
        arguments: object = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(arguments, dict):
        raise ValueError("is no JSON object")
    return arguments


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def to_json(value: object) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)
