"""How the arguments of a call are written: as one JSON object, or one by one in the words of a family of models.

Whoever reads a call gets JSON in either case: a reader turns what a model writes into the text of a JSON object, piece
by piece as it comes.
"""

from collections.abc import Iterator
from typing import Protocol

import msgspec

from cllm_core.text.grammar import json_rule
from cllm_core.text.json_text import ValueScanner
from cllm_core.text.lark import Vocabulary
from cllm_core.text.tools.functions import Function


class ArgumentReader(Protocol):
    """Reads the arguments of one call out of a text that arrives in pieces."""

    @property
    def is_complete(self) -> bool:
        """Whether all arguments have been read."""
        ...

    def read(self, text: str) -> tuple[str, int]:
        """Take the beginning of a text.

        Returns:
            What it adds to the text of a JSON object, and the characters that were taken; the others have to be given
            again, with more behind them, unless the arguments are complete.

        Raises:
            ValueError: the text is not in the format; the message tells what should come.
        """
        ...


class ArgumentStyle(Protocol):
    """One way to write the arguments of a call."""

    @property
    def description(self) -> str:
        """What a model that does not know the style has to be told of it, in a sentence."""
        ...

    def write(self, arguments: str) -> str:
        """The text of a JSON object as a model would write it; ValueError where it is none."""
        ...

    def rules(self, name: str, function: Function, vocabulary: Vocabulary) -> Iterator[str]:
        """Rules of a grammar, the first of that name, for arguments of this function; others begin with the name.

        Raises:
            InvalidRequest: the function is strict, and its schema cannot be enforced whole.
        """
        ...

    def reader(self, function: Function) -> ArgumentReader:
        """A reader of arguments of this function."""
        ...


class JsonArguments(msgspec.Struct, frozen=True):
    """One JSON object."""

    @property
    def description(self) -> str:
        """In a sentence."""
        return "The arguments are a JSON object that matches the function's parameters."

    def write(self, arguments: str) -> str:
        """The object as it is."""
        return arguments

    def rules(self, name: str, function: Function, vocabulary: Vocabulary) -> Iterator[str]:
        """An object of the function's schema."""
        yield f"{name}: {json_rule(function.arguments_schema())}"

    def reader(self, function: Function) -> ArgumentReader:
        """Passes the object through."""
        return _ObjectReader()


class _ObjectReader:
    def __init__(self) -> None:
        self._scanner = ValueScanner()

    @property
    def is_complete(self) -> bool:
        return self._scanner.is_complete

    def read(self, text: str) -> tuple[str, int]:
        end = self._scanner.scan(text)
        return text[:end], end
