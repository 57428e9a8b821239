"""Metadata of a GGUF file under one prefix, which remembers what was read so that the rest can be named."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from cllm_core.errors import ModelLoadError
from cllm_core.models.gguf.file import Value

_NUM_NAMED: Final = 4


class Keys:
    """Typed values of the keys below a prefix; keys are named without it.

    A method that is given no default raises ModelLoadError where the key is missing, and always where the value has
    another type.
    """

    def __init__(self, path: Path, values: Mapping[str, Value], prefix: str) -> None:
        """Read nothing yet.

        Args:
            path: of the file, for messages.
            values: all metadata of the file.
            prefix: of the keys, with its dot.
        """
        self._path = path
        self._values = values
        self._prefix = prefix
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._values

    def is_array(self, key: str) -> bool:
        """Whether the value is a list of numbers."""
        return isinstance(self._values.get(self._prefix + key), np.ndarray)

    def ending(self, suffix: str) -> list[str]:
        """Keys that end so."""
        return [name.removeprefix(self._prefix) for name in self._values if self._has(name) and name.endswith(suffix)]

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; one for each layer is not read."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "must be one whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, with the shortest decimals that give the stored float32."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "must be a number")
        return shortest(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self._take(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "must be a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        value = self._take(key, None)
        if not isinstance(value, list):
            raise self.wrong(key, "must be a list of texts")
        return value

    def numbers(self, key: str) -> np.ndarray:
        """A list of numbers, [n]."""
        value = self._take(key, None)
        if not isinstance(value, np.ndarray):
            raise self.wrong(key, "must be a list of numbers")
        return value

    def ignore(self, keys: Iterable[str]) -> None:
        """Count these as read: they do not change what is computed."""
        self._read.update(keys)

    def require_all_read(self) -> None:
        """Raise ModelLoadError if there are keys that nothing asked for: they may change what is computed."""
        unread = [
            name for name in self._values if self._has(name) and name.removeprefix(self._prefix) not in self._read
        ]
        if unread:
            raise ModelLoadError(
                f"{self._path}: has keys that are not known ({first_of(unread)}); they would be left out of the "
                "computation, so name the model in another format"
            )

    def wrong(self, key: str, problem: str) -> ModelLoadError:
        """The error for a value that cannot be used, such as "must be positive"."""
        value = self._values.get(self._prefix + key)
        shown = f"an array of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)
        return ModelLoadError(
            f"{self._path}: {self._prefix}{key} is {shown}, {problem}; convert the model again, or name its folder"
        )

    def _has(self, name: str) -> bool:
        return name.startswith(self._prefix)

    def _take(self, key: str, default: Value | None) -> Value:
        self._read.add(key)
        value = self._values.get(self._prefix + key, default)
        if value is None:
            raise ModelLoadError(f"{self._path}: has no {self._prefix}{key}; convert the model again")
        return value


def shortest(number: float) -> float:
    """The number with the fewest decimals that is stored as this float32: 0.6, not 0.6000000238418579."""
    return float(str(np.float32(number)))


def first_of(names: list[str]) -> str:
    """The first few names, for a message."""
    return f"{len(names)}: " + ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")
