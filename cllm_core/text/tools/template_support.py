"""What of a conversation with tools a chat template writes itself: found out by having it write one.

Templates differ in more than their format: some tell the model of functions but drop the calls of earlier answers, some
want arguments as text, some allow one call a message.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from cllm_core.errors import InvalidRequest
from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.json_text import to_json
from cllm_core.text.tools.skeleton import ToolFormat

Message = Mapping[str, object]

_NAME, _PARAMETER, _VALUES = "probe_function", "probe_parameter", ("probe_value_0", "probe_value_1")
_RESULT, _SYSTEM = "probe_result", "probe_system"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {_PARAMETER: {"type": "string", "description": "Any."}}},
    },
}
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_USER = {"role": "user", "content": "Hi"}


class TemplateSupport(msgspec.Struct, frozen=True, kw_only=True):
    """What a template does, and how it wants to be given it.

    Attributes:
        system: writes a system message.
        functions: tells the model of functions that it is given as `tools`.
        functions_in_system: tells of them where they are the field `tools` of the system message, as JSON.
        calls: writes the calls of an assistant's message.
        results: writes messages of the role `tool`.
        arguments_as_text: wants the arguments of calls as text, else as objects.
        null_content: wants the content of a message of calls alone to be null, else empty.
        one_call: allows one call a message.
        reasoning_fields: of an assistant's message, in which it looks for what that reasoned.
    """

    system: bool = False
    functions: bool = False
    functions_in_system: bool = False
    calls: bool = False
    results: bool = False
    arguments_as_text: bool = False
    null_content: bool = False
    one_call: bool = False
    reasoning_fields: tuple[str, ...] = ()


def find_support(template: ChatTemplate | None) -> TemplateSupport:
    """What a template does; nothing where there is none."""
    if template is None:
        return TemplateSupport()
    probe = _Probe(template)
    as_text = not probe.writes_call(as_text=False) and probe.writes_call(as_text=True)
    calls = as_text or probe.writes_call(as_text=False)
    functions, in_system = probe.writes_functions(), probe.writes_functions_in_system()
    # A template that knows nothing of tools may write whatever role it is given.
    knows_tools = calls or functions or in_system
    return TemplateSupport(
        system=probe.finds(_SYSTEM, [{"role": "system", "content": _SYSTEM}, _USER]),
        functions=functions,
        functions_in_system=in_system,
        calls=calls,
        results=knows_tools and any(probe.finds(_RESULT, talk) for talk in _conversations(as_text=as_text)),
        arguments_as_text=as_text,
        null_content=calls and probe.prefers_null(as_text=as_text),
        one_call=calls and not probe.writes_call(as_text=as_text, num_calls=2),
        reasoning_fields=tuple(field for field in _REASONING_FIELDS if _reads(template.source, field)),
    )


def writes_calls_in(template: ChatTemplate, tool_format: ToolFormat) -> bool:
    """Whether the calls that a template writes begin as in this format; templates may only mention one."""
    texts = [text for as_text in (False, True) for text in _Probe(template).calls(as_text=as_text)]
    return any(marker in text for text in texts for marker in tool_format.markers([_NAME]))


def _reads(source: str, field: str) -> bool:
    """Whether a template reads a field of something: `m.thinking` or `m['thinking']`, not a variable `thinking`."""
    return re.search(rf"\.\s*{field}\b|['\"]{field}['\"]", source) is not None


class _Probe:
    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def finds(self, text: str, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> bool:
        return text in self._render(messages, tools)

    def writes_functions(self) -> bool:
        if not self._template.handles_tools:
            return False
        system = {"role": "system", "content": _SYSTEM}
        return any(self.finds(_NAME, messages, [_TOOL]) for messages in ([_USER], [system, _USER]))

    def writes_functions_in_system(self) -> bool:
        system = {"role": "system", "content": _SYSTEM, "tools": to_json([_TOOL["function"]])}
        return self.finds(_NAME, [system, _USER], [])

    def writes_call(self, *, as_text: bool, num_calls: int = 1) -> bool:
        """Whether it writes all calls of a message, their arguments as JSON or in a form of its own."""
        return any(not _is_mangled(text) for text in self.calls(as_text=as_text, num_calls=num_calls))

    def calls(self, *, as_text: bool, num_calls: int = 1) -> list[str]:
        """Prompts that hold all calls of a message."""
        texts = [self._render(messages) for messages in _conversations(as_text=as_text, num_calls=num_calls)]
        return [text for text in texts if all(value in text for value in _VALUES[:num_calls])]

    def prefers_null(self, *, as_text: bool) -> bool:
        """Whether a content of null leaves out something that an empty one does not, and writes nothing for it."""
        empty, null = (self._render([_USER, _caller(content, as_text=as_text)]) for content in ("", None))
        is_written = _VALUES[0] in null and "None" not in null
        return is_written and (len(null) < len(empty) or _VALUES[0] not in empty)

    def _render(self, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> str:
        """The prompt, empty where there is none; some templates that are for tools want some in any case."""
        for given in (tools, [_TOOL]) if tools is None else (tools,):
            try:
                return self._template.render(messages, given).text
            except InvalidRequest:
                continue
        return ""


def _is_mangled(text: str) -> bool:
    """Whether arguments show as Python's dict, or as JSON within a JSON string."""
    return f"{{'{_PARAMETER}" in text or f'\\"{_PARAMETER}' in text


def _conversations(*, as_text: bool, num_calls: int = 1) -> Iterator[list[Message]]:
    """Conversations with calls: some templates want the results too, some refuse a content that is missing or empty."""
    results = [{"role": "tool", "content": _RESULT, "tool_call_id": _call_id(i)} for i in range(num_calls)]
    for content in ("", None):
        caller = _caller(content, as_text=as_text, num_calls=num_calls)
        yield [_USER, caller]
        yield [_USER, caller, *results]


def _caller(content: str | None, *, as_text: bool, num_calls: int = 1) -> Message:
    calls = [
        {
            "id": _call_id(i),
            "type": "function",
            "function": {"name": _NAME, "arguments": to_json(arguments) if as_text else arguments},
        }
        for i, arguments in enumerate({_PARAMETER: value} for value in _VALUES[:num_calls])
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _call_id(index: int) -> str:
    return f"{index:09d}"  # what the strictest of them take
