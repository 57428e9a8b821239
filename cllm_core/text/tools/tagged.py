"""Arguments between tags, one by one: strings as they are, other values as JSON.

    <parameter=city>\\nParis\\n</parameter>\\n<parameter=days>\\n3\\n</parameter>\\n      {"city": "Paris", "days": 3}

Where the schema allows strings and other values, a value is what it can be read as: `null` is null, `Paris` a string.
"""

from collections.abc import Callable, Iterator

import msgspec

from cllm_core.text.grammar import json_rule
from cllm_core.text.json_text import parse_json, parse_object, to_json
from cllm_core.text.lark import Vocabulary, text_until
from cllm_core.text.tools.arguments import ArgumentReader
from cllm_core.text.tools.functions import Function
from cllm_core.text.tools.plain_text import text_pattern
from cllm_core.text.tools.schema import Parameter, may_be_json, read_parameters, type_of


class TaggedArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The fixed strings around name and value of each argument.

    Attributes:
        before_name: is not the beginning of what follows the last argument.
    """

    before_name: str
    before_value: str
    after_value: str

    @property
    def description(self) -> str:
        """In a sentence."""
        return "Arguments that are strings are written as they are, all others as JSON."

    def write(self, arguments: str) -> str:
        """Each argument between its tags."""
        return "".join(
            self.before_name
            + name
            + self.before_value
            + (value if isinstance(value, str) else to_json(value))
            + self.after_value
            for name, value in parse_object(arguments).items()
        )

    def rules(self, name: str, function: Function, vocabulary: Vocabulary) -> Iterator[str]:
        """The declared parameters in their order, then others where the schema allows some."""
        schema = function.arguments_schema()
        parameters = read_parameters(schema, is_strict=function.is_strict)
        parts = [f"{name}_{i}{'' if one.is_required else '?'}" for i, one in enumerate(parameters.declared)]
        if parameters.other is not None:
            parts.append(f"{name}_other*")
        yield f"{name}: {' '.join(parts) or to_json('')}"
        for i, parameter in enumerate(parameters.declared):
            head = vocabulary.literal(self.before_name + parameter.name + self.before_value)
            yield f"{name}_{i}: {head} {name}_{i}_value"
            yield from self._value(f"{name}_{i}_value", parameter, vocabulary, is_strict=function.is_strict)
        if parameters.other is not None:
            head = vocabulary.literal(self.before_name)
            yield f"{name}_other: {head} {name}_other_name {name}_other_value"
            yield from text_until(f"{name}_other_name", self.before_value, vocabulary, pattern=r"[^<>\n]+")
            yield from self._value(f"{name}_other_value", parameters.other, vocabulary, is_strict=function.is_strict)

    def reader(self, function: Function) -> ArgumentReader:
        """Turns them into an object."""
        return _TaggedReader(self, function)

    def _value(self, name: str, parameter: Parameter, vocabulary: Vocabulary, *, is_strict: bool) -> Iterator[str]:
        if parameter.may_be_text:
            pattern = text_pattern(parameter, is_strict=is_strict)
            yield from text_until(name, self.after_value, vocabulary, pattern=pattern)
        else:
            yield f"{name}: {name}_json {vocabulary.literal(self.after_value)}"
            yield f"{name}_json: {json_rule({**parameter.schema, 'x-guidance': {'lenient': not is_strict}})}"


class _TaggedReader:
    """Holds back what may be the beginning of a tag, and a value while it may be a string or something else."""

    def __init__(self, tags: TaggedArguments, function: Function) -> None:
        self._tags = tags
        self._parameters = read_parameters(function.arguments_schema(), is_strict=False)
        self._parameter: Parameter | None = None
        self._num_read = 0
        self._is_complete = False
        self._step: Callable[[str], tuple[str, int] | None] = self._read_border

    @property
    def is_complete(self) -> bool:
        return self._is_complete

    def read(self, text: str) -> tuple[str, int]:
        pieces: list[str] = []
        start = 0
        while not self._is_complete and (found := self._step(text[start:])) is not None:
            pieces.append(found[0])
            start += found[1]
        return "".join(pieces), start

    # Each of these reads one part and names the next; None where more text is needed.

    def _read_border(self, text: str) -> tuple[str, int] | None:
        tag = self._tags.before_name
        if text.startswith(tag):
            self._step = self._read_name
            return "", len(tag)
        if tag.startswith(text):
            return None
        self._is_complete = True
        return "}" if self._num_read else "{}", 0

    def _read_name(self, text: str) -> tuple[str, int] | None:
        name, tag, _ = text.partition(self._tags.before_value)
        if not tag:
            return None
        self._parameter = self._parameters.find(name)
        self._step = self._begin_value
        opening = ", " if self._num_read else "{"
        self._num_read += 1
        return f"{opening}{to_json(name)}: ", len(name) + len(tag)

    def _begin_value(self, text: str) -> tuple[str, int] | None:
        parameter = self._expected
        if parameter.is_text:
            self._step = self._read_text
            return '"', 0
        self._step = self._read_either if parameter.may_be_text else self._read_json
        return "", 0

    def _read_text(self, text: str) -> tuple[str, int] | None:
        value, taken, is_last = self._split(text)
        if is_last:
            self._step = self._read_border
            return to_json(value)[1:], taken
        return (to_json(value)[1:-1], taken) if value else None

    def _read_json(self, text: str) -> tuple[str, int] | None:
        value, taken, is_last = self._split(text)
        if is_last:
            self._step = self._read_border
        return (value, taken) if taken else None

    def _read_either(self, text: str) -> tuple[str, int] | None:
        value, taken, is_last = self._split(text)
        if is_last:
            self._step = self._read_border
            return self._as_json(value), taken
        if may_be_json(value, self._expected.types):
            return None
        self._step = self._read_text
        return '"', 0

    @property
    def _expected(self) -> Parameter:
        assert self._parameter is not None  # its name came before its value
        return self._parameter

    def _split(self, text: str) -> tuple[str, int, bool]:
        """Text that belongs to the value, the characters that it and its closing tag take, whether the tag is there."""
        tag = self._tags.after_value
        value, found, _ = text.partition(tag)
        if found:
            return value, len(value) + len(tag), True
        num_held = next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
        value = text[: len(text) - num_held]
        return value, len(value), False

    def _as_json(self, text: str) -> str:
        """The value as JSON of one of its types, the text as a string where it is none."""
        try:
            found = type_of(parse_json(text))
        except ValueError:
            return to_json(text)
        return text.strip() if found != "string" and found in self._expected.types else to_json(text)
