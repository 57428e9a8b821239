"""Keyword arguments of a call in Python's syntax: city="Paris", days=3 is {"city": "Paris", "days": 3}.

Values are JSON, which is nearly Python too. Models that write Python literals get `True`, `False` and `None` for values
that are nothing else; these words are read wherever they are a whole value.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from cllm_core.text.grammar import json_rule
from cllm_core.text.json_text import ValueScanner, parse_object, to_json
from cllm_core.text.lark import Vocabulary, regex
from cllm_core.text.tools.arguments import ArgumentReader
from cllm_core.text.tools.functions import Function
from cllm_core.text.tools.schema import Parameter, Schema, as_list, read_parameters

_OF_PYTHON: Mapping[str, str] = {"true": "True", "false": "False", "null": "None"}
_OF_JSON = {python: json for json, python in _OF_PYTHON.items()}
_NULL = {"type": "null"}


class KeywordArguments(msgspec.Struct, frozen=True, kw_only=True):
    """name=value, separated by commas.

    Attributes:
        python_words: `True`, `False` and `None` are written, else `true`, `false` and `null`.
    """

    python_words: bool

    @property
    def description(self) -> str:
        """In a sentence."""
        return f"The arguments are {'Python literals' if self.python_words else 'JSON'}, each behind its name."

    def write(self, arguments: str) -> str:
        """The arguments as keywords."""
        return ", ".join(f"{name}={self._word(to_json(value))}" for name, value in parse_object(arguments).items())

    def rules(self, name: str, function: Function, vocabulary: Vocabulary) -> Iterator[str]:
        """The declared parameters in their order, then others where the schema allows some."""
        parameters = read_parameters(function.arguments_schema(), is_strict=function.is_strict)
        yield from _separated(name, parameters.declared, has_others=parameters.other is not None)
        for i, parameter in enumerate(parameters.declared):
            yield f"{name}_{i}: {to_json(parameter.name + '=')} {name}_{i}_value"
            yield from self._value(f"{name}_{i}_value", parameter, is_strict=function.is_strict)
        if parameters.other is not None:
            yield f"{name}_other: {regex('[A-Za-z_][A-Za-z0-9_]*=')} {name}_other_value"
            yield from self._value(f"{name}_other_value", parameters.other, is_strict=function.is_strict)

    def reader(self, function: Function) -> ArgumentReader:
        """Turns them into an object."""
        return _KeywordReader()

    def _word(self, value: str) -> str:
        return _OF_PYTHON.get(value, value) if self.python_words else value

    def _value(self, name: str, parameter: Parameter, *, is_strict: bool) -> Iterator[str]:
        schema, words = _split_words(parameter.schema) if self.python_words else (parameter.schema, [])
        alternatives = [to_json(word) for word in words]
        if schema is not None:
            alternatives.append(f"{name}_json")
            yield f"{name}_json: {json_rule({**schema, 'x-guidance': {'lenient': not is_strict}})}"
        yield f"{name}: {' | '.join(alternatives)}"


def _split_words(schema: Schema) -> tuple[Schema | None, list[str]]:
    """The values that are written as words of Python, and what is left of the schema without them, None for nothing."""
    named = schema.get("type")
    if named == "boolean" and not {"enum", "const"} & schema.keys():
        return None, ["True", "False"]
    options, kinds = as_list(schema.get("anyOf")), as_list(named)
    if _NULL in options and len(options) > 1:
        others = [option for option in options if option != _NULL]
        only = others[0] if len(others) == 1 and isinstance(others[0], Mapping) else {"anyOf": others}
        rest, words = _split_words({**{key: value for key, value in schema.items() if key != "anyOf"}, **only})
        return rest, [*words, "None"]
    if "null" in kinds and len(kinds) > 1 and not {"enum", "const"} & schema.keys():
        others = [kind for kind in kinds if kind != "null"]
        rest, words = _split_words({**schema, "type": others[0] if len(others) == 1 else others})
        return rest, [*words, "None"]
    return schema, []


def _separated(name: str, parameters: Sequence[Parameter], *, has_others: bool) -> Iterator[str]:
    """Rules for parameters with commas between them, of which some may be left out.

    ::

        args_first_0   from parameter 0 on, nothing is written yet
        args_then_0    the same behind another parameter
    """
    end = len(parameters)
    yield f"{name}: {name}_first_0"
    for i, parameter in enumerate(parameters):
        skipped = "" if parameter.is_required else " | {}"
        yield f"{name}_first_{i}: {name}_{i} {name}_then_{i + 1}" + skipped.format(f"{name}_first_{i + 1}")
        yield f'{name}_then_{i}: ", " {name}_{i} {name}_then_{i + 1}' + skipped.format(f"{name}_then_{i + 1}")
    others = f'(", " {name}_other)*' if has_others else '""'
    yield f"{name}_then_{end}: {others}"
    yield f"{name}_first_{end}: " + (f"({name}_other {others})?" if has_others else '""')


class _KeywordReader:
    """Passes values on as they come; holds back names, numbers and words until they are whole."""

    def __init__(self) -> None:
        self._scanner = ValueScanner()
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
        if not text:
            return None
        if text[0] == ")":
            self._is_complete = True
            return "}" if self._num_read else "{}", 0
        self._step = self._read_name
        if not self._num_read:
            return "{", 0
        if text[0] != ",":
            raise ValueError("',' or ')'")
        return ", ", 1

    def _read_name(self, text: str) -> tuple[str, int] | None:
        name, sign, _ = text.partition("=")
        if not sign:
            return None
        self._num_read += 1
        self._scanner = ValueScanner()
        self._step = self._read_value
        return f"{to_json(name.strip())}: ", len(name) + 1

    def _read_value(self, text: str) -> tuple[str, int] | None:
        if not text:
            return None
        if text[0] in '{["' or self._scanner.is_delimited:
            return self._read_delimited(text)
        size = ValueScanner().scan(text)
        if size == len(text):
            return None
        self._step = self._read_border
        return _OF_JSON.get(text[:size], text[:size]), size

    def _read_delimited(self, text: str) -> tuple[str, int]:
        size = self._scanner.scan(text)
        if self._scanner.is_complete:
            self._step = self._read_border
        return text[:size], size
