"""Reads calls of functions out of a text that arrives in pieces; how it was cut into pieces changes nothing.

    text       Let me see.\\n<tool_call>\\n{"name": "f", "arguments": {"x": 1}}\\n</tool_call>
    content    Let me see.
    calls                                    f                   {"x": 1}

Content never holds a marker, nor the white space before one. The grammar lets a model write nothing but the format
behind a marker, so a text that leaves it there is a fault of the engine.
"""

import string
from collections.abc import Callable, Iterable, Sequence

import msgspec

from cllm_core.errors import EngineFailed
from cllm_core.text.tools.arguments import ArgumentReader
from cllm_core.text.tools.functions import Function, FunctionCall
from cllm_core.text.tools.skeleton import WHITE_SPACE, ToolFormat

_NAME_CHARS = string.ascii_letters + string.digits + "_-"


class CallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one call: first its name with no arguments, then its arguments piece by piece.

    Attributes:
        index: of the call in its output.
        name: in the first delta of the call, None in the others.
        arguments: a piece of the text of a JSON object.
    """

    index: int
    name: str | None = None
    arguments: str = ""


class ReadText(msgspec.Struct, frozen=True):
    """What a piece of text added."""

    content: str = ""
    calls: tuple[CallDelta, ...] = ()


class CallReader:
    """Splits one output into its content and the calls behind it."""

    def __init__(self, tool_format: ToolFormat, functions: Sequence[Function], *, is_required: bool = False) -> None:
        """Start an empty output.

        Args:
            functions: that it may call, at least one.
            is_required: it is calls, so that a beginning of one is no content even where the output ends there.
        """
        self._is_required = is_required
        self._format = tool_format
        self._functions = functions
        self._markers = tool_format.markers([function.name for function in functions])
        self._held = ""  # may be part of a marker, or white space before one
        self._has_content = False
        self._calls: CallParser | None = None

    @property
    def is_calling(self) -> bool:
        """Whether no content follows: a marker was read, or there are only calls from the beginning on."""
        return self._is_required or self._calls is not None

    def push(self, text: str) -> ReadText:
        """Take the next piece and return what it adds; EngineFailed where a call is not in the format."""
        if self._calls is not None:
            return ReadText(calls=self._calls.push(text))
        pending = self._held + text
        content, start = self._split(pending)
        if start is None:
            self._held = pending[len(content) :]
            self._has_content = self._has_content or bool(content)
            return ReadText(content)
        self._held = ""
        self._calls = CallParser(self._format, self._functions)
        return ReadText(content, self._calls.push(pending[start:]))

    def peek(self, text: str) -> str:
        """Return the content that `push` would, and stay as before: for text that may yet change."""
        return "" if self.is_calling else self._split(self._held + text)[0]

    def flush(self) -> str:
        """Return the content held back; call it where the output ends.

        Where there may be content, the beginning of a marker that was cut is some: nothing tells the two apart.
        """
        held, self._held = self._held, ""
        return "" if self.is_calling else held

    def _split(self, pending: str) -> tuple[str, int | None]:
        """The content that can be given, and where the first marker begins, None while there is none."""
        start, num_safe = self._find_anywhere(pending) if self._format.marker else self._find_at_start(pending)
        return pending[: num_safe if start is None else start].rstrip(WHITE_SPACE), start

    def _find_anywhere(self, pending: str) -> tuple[int | None, int]:
        """Where the marker begins, and how many characters belong to none."""
        (marker,) = self._markers
        start = pending.find(marker)
        if start >= 0:
            return start, start
        longest = min(len(marker) - 1, len(pending))
        num_held = next((size for size in range(longest, 0, -1) if pending.endswith(marker[:size])), 0)
        return None, len(pending) - num_held

    def _find_at_start(self, pending: str) -> tuple[int | None, int]:
        """The same for markers that only an output's beginning can be."""
        text = pending.lstrip(WHITE_SPACE)
        if self._has_content:
            return None, len(pending)
        if any(text.startswith(marker) for marker in self._markers):
            return len(pending) - len(text), 0
        may_come = any(marker.startswith(text) for marker in self._markers)
        return None, 0 if may_come else len(pending)


class CallParser:
    """Takes the text of calls from the first marker on."""

    def __init__(self, tool_format: ToolFormat, functions: Sequence[Function]) -> None:
        """Start before the first marker; of functions that are not among these the parameters are not known."""
        self._format = tool_format
        self._functions = {function.name: function for function in functions}
        self._pending = ""
        self._index = -1
        self._arguments: ArgumentReader | None = None  # of the call that is being read
        self._read: Callable[[], list[CallDelta] | None] = self._read_first

    def push(self, text: str) -> tuple[CallDelta, ...]:
        """What the text adds to the calls."""
        self._pending += text
        deltas: list[CallDelta] = []
        while self._pending and (new := self._read()) is not None:
            deltas += new
        return tuple(deltas)

    # Each of these reads one part of the skeleton and names the next; None where more text is needed.

    def _read_first(self) -> list[CallDelta] | None:
        return self._read_fixed(self._format.first, then=self._read_name)

    def _read_name(self) -> list[CallDelta] | None:
        rest = self._pending.lstrip(_NAME_CHARS)
        if not rest:
            return None
        name, self._pending = self._pending.removesuffix(rest), rest
        self._index += 1
        self._arguments = self._format.style.reader(self._functions.get(name) or Function(name=name, parameters={}))
        self._read = self._read_between
        return [CallDelta(index=self._index, name=name)]

    def _read_between(self) -> list[CallDelta] | None:
        return self._read_fixed(self._format.between, then=self._read_arguments)

    def _read_arguments(self) -> list[CallDelta] | None:
        assert self._arguments is not None  # the name came first
        try:
            piece, size = self._arguments.read(self._pending)
        except ValueError as error:
            raise self._left_format(str(error)) from error
        self._pending = self._pending[size:]
        if self._arguments.is_complete:
            self._read = self._read_after
        elif not (piece or size):
            return None
        return [CallDelta(index=self._index, arguments=piece)] if piece else []

    def _read_after(self) -> list[CallDelta] | None:
        return self._read_fixed(self._format.after, then=self._read_border)

    def _read_border(self) -> list[CallDelta] | None:
        last = self._format.last
        if last and (last.startswith(self._pending) or self._pending.startswith(last)):
            return self._read_fixed(last, then=self._read_end)
        return self._read_fixed(self._format.next, then=self._read_name)

    def _read_end(self) -> list[CallDelta] | None:
        raise self._left_format("the end")

    def _read_fixed(self, text: str, *, then: Callable[[], list[CallDelta] | None]) -> list[CallDelta] | None:
        if self._pending.startswith(text):
            self._pending = self._pending[len(text) :]
            self._read = then
            return []
        if text.startswith(self._pending):
            return None
        raise self._left_format(repr(text))

    def _left_format(self, expected: str) -> EngineFailed:
        return EngineFailed(f"a call of a function left its format: {expected} should come, not {self._pending[:40]!r}")


def merge_deltas(deltas: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """The same news in as few deltas as there can be: neighbouring pieces of one call's arguments become one."""
    merged: list[CallDelta] = []
    for delta in deltas:
        if merged and delta.name is None and merged[-1].name is None:  # of the same call, for another began with a name
            merged[-1] = CallDelta(index=delta.index, arguments=merged[-1].arguments + delta.arguments)
        else:
            merged.append(delta)
    return tuple(merged)


def join_calls(deltas: Sequence[CallDelta]) -> tuple[FunctionCall, ...]:
    """The calls that the deltas of one output add up to."""
    names: list[str] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        if delta.name is not None:
            names.append(delta.name)
            arguments.append([])
        arguments[delta.index].append(delta.arguments)
    return tuple(FunctionCall(name, "".join(parts)) for name, parts in zip(names, arguments, strict=True))
