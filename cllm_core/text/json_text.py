"""JSON as models read and write it: texts of values, and where a value ends in a text that is still coming."""

import json
import re

_IN_JSON = re.compile(r'[{}\[\]"]')
_IN_STRING = re.compile(r'[\\"]')
_IN_SCALAR = re.compile(r"[A-Za-z0-9+\-.]*")


def to_json(value: object) -> str:
    """JSON on one line, as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def parse_json(text: str) -> object:
    """The value; ValueError where the text is not JSON, also where it is nested too deeply or holds NaN."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_object(text: str) -> dict[str, object]:
    """The object; ValueError where the text is none."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class ValueScanner:
    """Finds the end of one JSON value in a text that arrives in pieces; other mistakes go unnoticed.

    Attributes:
        is_complete: the whole value has come.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._is_scalar: bool | None = None  # None before the first character
        self.is_complete = False

    @property
    def is_delimited(self) -> bool:
        """Whether a string, list or object has begun."""
        return self._is_scalar is False

    def scan(self, text: str) -> int:
        """Characters of the text that belong to the value. A number or word ends where another character follows."""
        if not text or self.is_complete:
            return 0
        if self._is_scalar is None:
            self._is_scalar = text[0] not in '{["'
        return self._scan_scalar(text) if self._is_scalar else self._scan_delimited(text)

    def _scan_scalar(self, text: str) -> int:
        match = _IN_SCALAR.match(text)
        end = match.end() if match else 0
        self.is_complete = end < len(text)
        return end

    def _scan_delimited(self, text: str) -> int:
        place = 0
        while place < len(text):
            if self._is_escaped:
                self._is_escaped = False
                place += 1
                continue
            mark = (_IN_STRING if self._in_string else _IN_JSON).search(text, place)
            if mark is None:
                break
            place = mark.end()
            self._take(mark[0])
            if self._depth == 0 and not self._in_string:
                self.is_complete = True
                return place
        return len(text)

    def _take(self, mark: str) -> None:
        if mark == "\\":
            self._is_escaped = True
        elif mark == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if mark in "{[" else -1
