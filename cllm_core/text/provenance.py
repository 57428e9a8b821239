"""Text that knows which of its characters a client wrote, so that none of them can pass for a control token.

    '<|user|>' + content + '<|end|>'          text      <|user|>Hi<|end|>
                                              mask      00000000110000000         1: a client wrote this character

A TracedText is a str that a chat template handles like any other: what it joins, cuts or replaces keeps its mask. Every
other operation returns a plain str; `template_environment` lets `of_any` decide whose that is. A plain str within a
template is the template's own text.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import SupportsIndex, TypeVar

import msgspec

T = TypeVar("T")

_TEMPLATE, _CLIENT = b"\0", b"\1"

# One field of printf-style formatting: %s, %5.2f, %(name)s. Widths that are arguments themselves (%*d) are left out.
_PRINTF_FIELD = re.compile(r"%(?P<name>\([^)]*\))?(?P<form>[-#0 +]*\d*(?:\.\d+)?[a-zA-Z%])")


class ChatPrompt(msgspec.Struct, frozen=True):
    """What a chat template made of a conversation.

    Attributes:
        text: control tokens spelled out.
        client_mask: a byte for each character of the text, 1 where it comes from the conversation, 0 where the template
            wrote it.
    """

    text: str
    client_mask: bytes


class TracedText(str):
    """A str with the provenance of each character; equal to the plain str, with the same hash."""

    __slots__ = ("_mask",)
    _mask: bytes

    def __new__(cls, text: str, mask: bytes) -> "TracedText":
        """Take the text and its mask, a byte for each character."""
        traced = super().__new__(cls, text)
        traced._mask = mask
        return traced

    # Jinja calls str() on all that it prints, which must not lose the mask.
    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mod__(self, values: object) -> str:
        return _printf(self, values)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        text = super().__getitem__(key)
        return TracedText(text, self._mask[key] if isinstance(key, slice) else bytes([self._mask[key]]))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def join(self, parts: Iterable[str]) -> str:
        """As str.join."""
        listed = list(parts)
        super().join(listed)  # refuses what is no text
        return concat(piece for i, part in enumerate(listed) for piece in ((self, part) if i else (part,)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        """As str.replace."""
        if not old:
            return of_any(super().replace(old, new, count), self, new)
        return from_template(new).join(self.split(old, count))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As str.split."""
        return self._located(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As str.rsplit."""
        return self._located(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As str.splitlines."""
        whole_lines = self._located(super().splitlines(keepends=True), "")
        return [whole[: len(line)] for whole, line in zip(whole_lines, super().splitlines(keepends), strict=True)]

    def partition(self, sep: str) -> tuple[str, str, str]:
        """As str.partition."""
        before, found, behind = self._located(super().partition(sep), "")
        return before, found, behind

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        """As str.rpartition."""
        before, found, behind = self._located(super().rpartition(sep), "")
        return before, found, behind

    def strip(self, chars: str | None = None) -> str:
        """As str.strip."""
        return from_template(self.lstrip(chars)).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> str:
        """As str.lstrip."""
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> str:
        """As str.rstrip."""
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str) -> str:
        """As str.removeprefix."""
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str) -> str:
        """As str.removesuffix."""
        return self[: len(super().removesuffix(suffix))]

    def _located(self, pieces: Iterable[str], sep: str | None) -> list[str]:
        """Pieces of this text in their order, traced; `sep` stands between them, None: white space."""
        located: list[str] = []
        start = 0
        for piece in pieces:
            if sep is None:
                start = self.index(piece, start)
            located.append(self[start : start + len(piece)])
            start += len(piece) + len(sep or "")
        return located


def from_template(text: str) -> TracedText:
    """The text; it is the template's own unless it is traced already."""
    return text if isinstance(text, TracedText) else TracedText(text, _TEMPLATE * len(text))


def from_client(value: T) -> T:
    """A copy of plain data (as parsed from JSON) in which each text, keys included, is the client's.

    Texts that are traced keep their masks: a server that writes into a message marks its own words.
    """
    copy: object = value
    if isinstance(value, str):
        copy = value if isinstance(value, TracedText) else _wholly_from_client(value)
    elif isinstance(value, Mapping):
        copy = {from_client(key): from_client(item) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        copy = [from_client(item) for item in value]
    return copy  # type: ignore[return-value]  # a str is copied to a str, and so on


def of_any(text: str, *sources: object) -> str:
    """A text that was made of these values nobody knows how: all of it is the client's where some of them is."""
    return _wholly_from_client(text) if any(map(holds_client_text, sources)) else text


def holds_client_text(value: object) -> bool:
    """Whether a client wrote some of a text, or of the texts in plain data; also true of what cannot be looked into."""
    if isinstance(value, TracedText):
        return _CLIENT in value._mask
    if isinstance(value, Mapping):
        return any(holds_client_text(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple):
        return any(map(holds_client_text, value))
    return not (value is None or isinstance(value, int | float) or type(value) is str)


def concat(parts: Iterable[str]) -> TracedText:
    """The parts as one text, masks kept."""
    listed = list(parts)
    return TracedText("".join(listed), b"".join(map(_mask_of, listed)))


def to_prompt(text: str) -> ChatPrompt:
    """The text and its mask as plain values."""
    return ChatPrompt(str.__str__(text), _mask_of(text))


def _wholly_from_client(text: str) -> TracedText:
    return TracedText(text, _CLIENT * len(text))


def _mask_of(text: str) -> bytes:
    if isinstance(text, TracedText):
        return text._mask
    return (_CLIENT if holds_client_text(text) else _TEMPLATE) * len(text)


def _printf(text: TracedText, values: object) -> str:
    """`text % values`, each field with the provenance of its value."""
    filled = str.__mod__(text, values)
    positional = iter(values if isinstance(values, tuple) else (values,))
    pieces: list[str] = []
    end = 0
    for field in _PRINTF_FIELD.finditer(text):
        pieces.append(text[end : field.start()])
        if field["form"] == "%":
            pieces.append("%")
        elif field["name"] is not None and isinstance(values, Mapping):
            pieces.append(_printf_field(field["form"], values[field["name"][1:-1]]))
        else:
            pieces.append(_printf_field(field["form"], next(positional, None)))
        end = field.end()
    followed = concat([*pieces, text[end:]])
    return (
        followed if followed == filled else of_any(filled, text, *(values if isinstance(values, tuple) else [values]))
    )


def _printf_field(form: str, value: object) -> str:
    return value if form == "s" and isinstance(value, TracedText) else of_any(f"%{form}" % (value,), value)
