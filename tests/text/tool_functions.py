"""Functions for the laws of tool formats, and random calls of them: every type of parameter that a schema can tell."""

from collections.abc import Mapping

from hypothesis import strategies as st

from cllm_core.text.json_text import parse_object, to_json
from cllm_core.text.tools.formats import FORMATS
from cllm_core.text.tools.functions import Function, FunctionCall
from cllm_core.text.tools.skeleton import ToolFormat
from cllm_core.text.tools.tagged import TaggedArguments

SEQUENTIAL = tuple(tool_format for tool_format in FORMATS if not tool_format.has_channels)
"""Formats in which calls stand behind the text; the others are read by `harmony`."""

NAMES = ("get", "get_weather", "a-1")
PROPERTIES = {
    "text": {"type": "string"},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "count": {"type": "integer"},
    "size": {"type": "number"},
    "flag": {"type": "boolean"},
    "tags": {"type": "array"},
    "more": {"$ref": "#/$defs/more"},
    "empty": {"type": ["null", "boolean"]},
}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "$defs": {"more": {"type": "object"}}}
FUNCTIONS = tuple(Function(name=name, parameters=PARAMETERS) for name in NAMES)

texts = st.text(max_size=8) | st.text("\n</parameter>arg_valul}'\" é", max_size=16)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "text": texts | st.sampled_from(["5", "null", "", '"quoted"', "[1]", " x \n"]),
        "note": st.none() | texts.filter(lambda text: text.strip() != "null"),
        "count": st.integers(),
        "size": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
        "flag": st.booleans(),
        "tags": st.lists(json_values, max_size=3),
        "more": st.dictionaries(st.text(), json_values, max_size=3),
        "empty": st.none() | st.booleans(),
    },
)


def _in_order(values: Mapping[str, object]) -> dict[str, object]:
    """As grammars want them."""
    return {name: values[name] for name in PROPERTIES if name in values}


calls = st.builds(FunctionCall, st.sampled_from(NAMES), arguments.map(_in_order).map(to_json))


def can_write(tool_format: ToolFormat, call: FunctionCall) -> bool:
    """Whether the format has a way to write the call: where strings have no quotes, they cannot hold a closing tag."""
    style = tool_format.style
    if not isinstance(style, TaggedArguments):
        return True
    values = [value for value in parse_object(call.arguments).values() if isinstance(value, str)]
    return all((value + style.after_value).index(style.after_value) == len(value) for value in values)
