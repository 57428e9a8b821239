"""Conversations with calls of functions, in the words of a chat template: one that knows tools, or one that does not.

A template that does not gets calls and their results as text, and the functions described in the system message.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile

import msgspec
from pydantic_core import from_json

from cllm_core.text.json_text import to_json
from cllm_core.text.provenance import concat, from_client, from_template
from cllm_core.text.tools.functions import Function, FunctionCall, parse_arguments
from cllm_core.text.tools.skeleton import ToolFormat


class MadeCall(msgspec.Struct, frozen=True):
    """A call of an earlier answer and the id that its result refers to."""

    call_id: str
    call: FunctionCall


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation.

    Attributes:
        role: as chat templates know it: system, user, assistant or tool.
        name: of the participant, None where the client gave none.
        calls: of the assistant; the arguments of one that was cut are not a whole JSON object.
        call_id: of the call that a tool's message is the result of.
        reasoning: of the assistant, before its content and calls.
    """

    role: str
    content: str
    name: str | None = None
    calls: tuple[MadeCall, ...] = ()
    call_id: str | None = None
    reasoning: str | None = None

    def as_message(
        self, *, arguments_as_text: bool = False, null_content: bool = False, reasoning_fields: Sequence[str] = ()
    ) -> dict[str, object]:
        """The message as a template expects it.

        Args:
            arguments_as_text: give the arguments of calls as they are, else as objects.
            null_content: give no text beside calls as null, else as an empty text.
            reasoning_fields: that the template reads reasoning from.
        """
        calls = [
            {
                "id": made.call_id,
                "type": "function",
                "function": {
                    "name": made.call.name,
                    "arguments": made.call.arguments if arguments_as_text else _arguments(made.call),
                },
            }
            for made in self.calls
        ]
        content = None if null_content and calls and not self.content else self.content
        optional = {"name": self.name, "tool_calls": calls or None, "tool_call_id": self.call_id}
        given = {key: value for key, value in optional.items() if value is not None}
        reasoning = dict.fromkeys(reasoning_fields, self.reasoning) if self.reasoning else {}
        return {"role": self.role, "content": content, **reasoning, **given}


def _arguments(call: FunctionCall) -> object:
    """The object, what there is of one that was cut, or the text where it cannot be read at all."""
    try:
        return parse_arguments(call.arguments)
    except ValueError:
        pass
    try:
        return from_json(call.arguments, allow_partial="trailing-strings")
    except ValueError:
        return call.arguments


def _arguments_text(call: FunctionCall) -> str:
    """The text as it came, or JSON of what can be read of one that was cut: half a call would teach a bad form."""
    try:
        parse_arguments(call.arguments)
    except ValueError:
        return to_json(_arguments(call))
    return call.arguments


def write_calls(turns: Sequence[Turn], tool_format: ToolFormat) -> list[Turn]:
    """The conversation with calls as text of the assistant."""
    return [_with_written_calls(turn, tool_format) for turn in turns]


def write_results(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation with tools' messages as text of the user."""
    written: list[Turn] = []
    for is_result, group in groupby(turns, lambda turn: turn.role == "tool"):
        if is_result:
            # One turn for all results of an answer: many templates want user and assistant to alternate.
            results = (f"<tool_response>\n{turn.content}\n</tool_response>" for turn in group)
            written.append(Turn(role="user", content="\n".join(results)))
        else:
            written += group
    return written


def separate_calls(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation with one call a message, each followed by its result."""
    separate: list[Turn] = []
    for index, turn in enumerate(turns):
        if len(turn.calls) > 1:
            results = list(takewhile(lambda later: later.role == "tool", turns[index + 1 :]))
            for place, made in enumerate(turn.calls):
                first = turn if place == 0 else msgspec.structs.replace(turn, content="", reasoning=None)
                separate.append(msgspec.structs.replace(first, calls=(made,)))
                separate += [result for result in results if result.call_id == made.call_id]
        elif turn.role != "tool" or not any(turn.call_id == made.call_id for made in _caller(turns, index)):
            separate.append(turn)
    return separate


def join_reasoning(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation with reasoning and text before a call as one: some templates refuse to write both."""
    return [
        msgspec.structs.replace(turn, reasoning="\n\n".join(filter(None, [turn.reasoning, turn.content])), content="")
        if turn.calls
        else turn
        for turn in turns
    ]


def _caller(turns: Sequence[Turn], index: int) -> tuple[MadeCall, ...]:
    """The calls of the message that the result at this place belongs to, where it makes several."""
    before = next((turn for turn in reversed(turns[:index]) if turn.role != "tool"), None)
    return before.calls if before is not None and len(before.calls) > 1 else ()


def describe(turns: Sequence[Turn], functions: Sequence[Function], tool_format: ToolFormat) -> list[Turn]:
    """The conversation with the functions described in its system message, which is put first where there is none."""
    text = _description(functions, tool_format)
    if turns and turns[0].role == "system":
        return [_with_text_behind(turns[0], text), *turns[1:]]
    return [Turn(role="system", content=text), *turns]


def with_system(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation with a system message first, one of ours where it has none."""
    if turns and turns[0].role == "system":
        return list(turns)
    return [Turn(role="system", content="You are a helpful assistant with some tools."), *turns]


def functions_text(functions: Sequence[Function]) -> str:
    """The functions as JSON, for templates that take it within the system message."""
    return to_json([function.as_tool()["function"] for function in functions])


def without_system(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation with its system message put before the user's first words: not all templates know it."""
    first, *rest = turns
    place = next((index for index, turn in enumerate(rest) if turn.role == "user"), None)
    if first.role != "system" or place is None:
        return list(turns)
    user = msgspec.structs.replace(rest[place], content=_joined(first.content, "\n\n", rest[place].content))
    return [*rest[:place], user, *rest[place + 1 :]]


def shorten_ids(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation with ids of calls that are nine digits, equal ones equal."""
    known: dict[str, str] = {}

    def short(call_id: str) -> str:
        return known.setdefault(call_id, f"{len(known):09d}")

    return [
        msgspec.structs.replace(
            turn,
            calls=tuple(MadeCall(short(made.call_id), made.call) for made in turn.calls),
            call_id=None if turn.call_id is None else short(turn.call_id),
        )
        for turn in turns
    ]


def _with_written_calls(turn: Turn, tool_format: ToolFormat) -> Turn:
    if not turn.calls:
        return turn
    calls = [FunctionCall(made.call.name, _arguments_text(made.call)) for made in turn.calls]
    written = _with_text_behind(turn, tool_format.write(calls), separator="\n")
    return msgspec.structs.replace(written, calls=())


def _with_text_behind(turn: Turn, text: str, *, separator: str = "\n\n") -> Turn:
    content = _joined(turn.content, separator, text) if turn.content else text
    return msgspec.structs.replace(turn, content=content)


def _joined(*parts: str) -> str:
    return concat(map(from_client, parts))


def _description(functions: Sequence[Function], tool_format: ToolFormat) -> str:
    return from_template("\n").join(_description_lines(functions, tool_format))


def _description_lines(functions: Sequence[Function], tool_format: ToolFormat) -> Iterator[str]:
    yield "You can call these functions, each described as JSON:"
    yield from (from_client(to_json(function.as_tool()["function"])) for function in functions)
    yield ""
    yield "To call functions, write nothing but the calls behind your words, in exactly this form:"
    yield tool_format.write([FunctionCall("function_name", '{"parameter": "value"}')])
    yield "Several calls:"
    yield tool_format.write([FunctionCall("first_function", "{}"), FunctionCall("second_function", "{}")])
    yield ""
    yield f"{tool_format.style.description} The next message brings the results,"
    yield "each between <tool_response> and </tool_response>. Where no function helps, answer without a call."
