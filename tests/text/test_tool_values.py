"""Laws of arguments that are written one by one: the grammar takes what the schema allows, and JSON is read of it."""

import json
import random
import re

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import Tokenizer

from cllm_core.errors import InvalidRequest
from cllm_core.text.lark import Vocabulary
from cllm_core.text.tools.functions import Function, FunctionCall
from cllm_core.text.tools.grammar import CallRules, calls_grammar
from cllm_core.text.tools.keywords import KeywordArguments
from cllm_core.text.tools.reader import CallReader, join_calls
from cllm_core.text.tools.skeleton import ToolFormat
from cllm_core.text.tools.tagged import TaggedArguments
from tests.text.factories import byte_level
from tests.text.tool_functions import FUNCTIONS, SEQUENTIAL, calls, can_write

TAGGED = [form for form in SEQUENTIAL if isinstance(form.style, TaggedArguments)]
KEYWORDS = [form for form in SEQUENTIAL if isinstance(form.style, KeywordArguments)]
TOKENIZER = byte_level()
VOCABULARY = LLTokenizer(TOKENIZER.to_str())
COLOUR = {"$defs": {"colour": {"enum": ["red", "blue"]}}}

each_tagged = pytest.mark.parametrize("tool_format", TAGGED, ids=lambda form: form.first + form.between)
each_keywords = pytest.mark.parametrize("tool_format", KEYWORDS, ids=lambda form: form.first)


def make_function(properties: dict[str, object], **changes: object) -> Function:
    parameters = {"type": "object", "properties": properties, **changes}
    return Function(name="f", parameters=parameters)


def make_matcher(tool_format: ToolFormat, *functions: Function, tokenizer: Tokenizer = TOKENIZER) -> LLMatcher:
    rules = CallRules(functions=functions, is_required=True, is_parallel=True)
    marks = {text: i for text in tool_format.tokens if (i := tokenizer.token_to_id(text)) is not None}
    grammar = calls_grammar(tool_format, rules, Vocabulary(marks=marks))
    return LLMatcher(VOCABULARY if tokenizer is TOKENIZER else LLTokenizer(tokenizer.to_str()), grammar)


def accepts(tool_format: ToolFormat, function: Function, text: str) -> bool:
    matcher = make_matcher(tool_format, function)
    assert not matcher.is_error(), matcher.get_error()
    ids = TOKENIZER.encode(text).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def read(tool_format: ToolFormat, function: Function, text: str) -> object:
    (call,) = join_calls(CallReader(tool_format, [function]).push(text).calls)
    return json.loads(call.arguments)


def one_value(tool_format: ToolFormat, value: str) -> str:
    """A call whose only argument is written like this."""
    style = tool_format.style
    assert isinstance(style, TaggedArguments)
    argument = style.before_name + "x" + style.before_value + value + style.after_value
    return tool_format.first + "f" + tool_format.between + argument + tool_format.after + tool_format.last


@each_tagged
@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, 'a <b>\n\n"c" é', 'a <b>\n\n"c" é'),
        ({"type": "string"}, "", ""),
        ({"type": "integer"}, "5", 5),
        ({"type": "boolean"}, "true", True),
        ({"type": "array", "items": {"type": "string"}}, '["a", "</parameter>"]', ["a", "</parameter>"]),
        ({"type": "object"}, '{"a": null}', {"a": None}),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "nullable", "nullable"),
        ({"type": ["string", "integer"]}, "-12", -12),
        ({"type": ["string", "integer"]}, "12 apples", "12 apples"),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}, "b", "b"),
        ({}, "[1, 2]", [1, 2]),
        ({}, "[1, 2", "[1, 2"),
        ({"$ref": "#/$defs/colour"}, "red", "red"),
        ({"allOf": [{"$ref": "#/$defs/colour"}], "default": "red"}, "blue", "blue"),
        ({"type": "string", "pattern": "^a+$"}, "aaa", "aaa"),
        ({"type": "string", "pattern": "b|^c"}, "abc", "abc"),
        ({"type": "string", "minLength": 2, "maxLength": 3}, "éé", "éé"),
        ({"type": "string", "format": "date"}, "2026-02-28", "2026-02-28"),
    ],
)
def test_a_value_is_what_its_schema_says(
    tool_format: ToolFormat, schema: dict[str, object], written: str, value: object
) -> None:
    function = make_function({"x": schema}, **COLOUR)
    text = one_value(tool_format, written)
    assert accepts(tool_format, function, text)
    assert read(tool_format, function, text) == {"x": value}


@each_tagged
@pytest.mark.parametrize(
    ("schema", "written"),
    [
        ({"type": "integer"}, "five"),
        ({"type": "integer"}, '"5"'),
        ({"type": "boolean"}, "True"),
        ({"type": "array", "items": {"type": "string"}}, "[1]"),
        ({"enum": ["red", "blue"]}, "green"),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}, "c"),
        ({"$ref": "#/$defs/colour"}, "green"),
        ({"type": "string", "pattern": "^a+$"}, "aab"),
        ({"type": "string", "pattern": "b|^c"}, "ac"),
        ({"type": "string", "minLength": 2, "maxLength": 3}, "abcd"),
        ({"type": "string", "minLength": 2}, "a"),
        ({"type": "string", "format": "date"}, "2026-13-01"),
    ],
)
def test_a_value_that_its_schema_forbids_is_refused(
    tool_format: ToolFormat, schema: dict[str, object], written: str
) -> None:
    assert not accepts(tool_format, make_function({"x": schema}, **COLOUR), one_value(tool_format, written))


TWO = {"a": {"type": "integer"}, "b": {"type": "boolean"}, "c": {"type": ["null", "array"]}}


@each_keywords
@pytest.mark.parametrize(
    ("written", "is_valid"),
    [
        ("a=1", True),
        ("a=1, b={true}", True),
        ("a=1, c=[2, null, {{}}]", True),
        ("a=1, b={true}, c={null}", True),
        ("", False),
        ("b={true}", False),
        ("b={true}, a=1", False),
        ("a=1, ", False),
        ("a=1, d=2", False),
        ("a=1 b={true}", False),
    ],
)
def test_keywords_come_in_the_order_of_the_schema(tool_format: ToolFormat, written: str, is_valid: bool) -> None:
    words = {"true": "True", "null": "None"} if tool_format.name == "pythonic" else {"true": "true", "null": "null"}
    text = f"{tool_format.first}f({written.format(**words)}){tool_format.last}"
    function = make_function(TWO, required=["a"])
    assert accepts(tool_format, function, text) == is_valid
    if is_valid:
        values = re.sub(r"(\w)=", r'"\1": ', written.format(true="true", null="null"))
        assert read(tool_format, function, text) == json.loads("{" + values + "}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x=True", True),
        ("x=None", None),
        ('x="True"', "True"),
        ("x=[1, {}]", [1, {}]),
        ('x="a\\", y=(b)"', 'a", y=(b)'),
        ("x=-1.5e3", -1500.0),
    ],
)
def test_keyword_values_are_read(text: str, value: object) -> None:
    (form,) = (form for form in KEYWORDS if form.name == "pythonic")
    assert read(form, make_function({"x": {}}), f"[f({text})]") == {"x": value}


@each_tagged
def test_parameters_that_are_not_declared_come_where_the_schema_allows_them(tool_format: ToolFormat) -> None:
    text = one_value(tool_format, "3")
    assert not accepts(tool_format, make_function({"y": {}}), text)
    assert accepts(tool_format, make_function({"y": {}}, additionalProperties={"type": "integer"}), text)
    assert accepts(tool_format, Function(name="f", parameters={"type": "object"}), text)
    assert read(tool_format, Function(name="f", parameters={"type": "object"}), text) == {"x": 3}


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(SEQUENTIAL), calls)
def test_whatever_a_format_writes_its_grammar_takes(tool_format: ToolFormat, call: FunctionCall) -> None:
    assume(can_write(tool_format, call))
    assume("\x7f" not in call.arguments)  # which the library wants to be escaped
    matcher = make_matcher(tool_format, *FUNCTIONS)
    ids = TOKENIZER.encode(tool_format.write([call])).ids
    assert matcher.try_consume_tokens(ids) == len(ids), (tool_format.write([call]), matcher.get_error())


def write_at_random(matcher: LLMatcher, seed: int, *, max_tokens: int) -> tuple[str, bool]:
    """An output of which each token is any that the grammar allows, and whether it came to an end."""
    rng = random.Random(seed)
    mask = allocate_token_bitmask(1, VOCABULARY.vocab_size)
    ids: list[int] = []
    while len(ids) < max_tokens:
        if matcher.is_accepting() and rng.random() < 0.5:
            break
        fill_next_token_bitmask(matcher, mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        text_ids = [int(i) for i in allowed if i != VOCABULARY.eos_token]
        if not text_ids:
            break
        ids.append(rng.choice(text_ids))
        matcher.consume_token(ids[-1])
    # The last character may not be whole.
    return TOKENIZER.decode(ids, skip_special_tokens=False).rstrip("\ufffd"), matcher.is_accepting()


PAINT = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "label": {"type": ["string", "null"], "maxLength": 3},
        "layers": {"type": "integer", "minimum": 1, "maximum": 99},
        "dry": {"type": "boolean"},
        "spots": {"type": "array", "items": {"enum": [1, 2, None]}, "maxItems": 3},
    },
    "required": ["colour", "layers"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("tool_format", SEQUENTIAL, ids=lambda form: f"{form.name} {form.first}")
def test_whatever_a_grammar_takes_is_read_as_calls_that_match_their_schema(tool_format: ToolFormat) -> None:
    function = Function(name="paint", parameters=PAINT)
    validator = jsonschema_rs.validator_for(PAINT)
    num_whole = 0
    for seed in range(12):
        text, is_whole = write_at_random(make_matcher(tool_format, function), seed, max_tokens=400)
        read_calls = join_calls(CallReader(tool_format, [function]).push(text).calls)
        for call in read_calls if is_whole else read_calls[:-1]:
            assert validator.is_valid(json.loads(call.arguments)), (text, call)
        num_whole += is_whole
    assert num_whole


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"x": {"type": "string"}}, "minProperties": 1},
        {"properties": {"x": {"type": "string", "format": "regex"}}},
        {"properties": {"x": {"type": "string", "pattern": "(?=a)b"}}},
        {"properties": {"x": {"type": "string", "pattern": "a", "minLength": 2}}},
        {"properties": {"x": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 3}]}}},
        {"properties": {"x": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "null"}}]}}},
    ],
)
def test_what_cannot_be_enforced_is_refused_only_where_the_function_is_strict(parameters: dict[str, object]) -> None:
    form = TAGGED[0]
    assert not make_matcher(form, Function(name="f", parameters=parameters)).is_error()
    with pytest.raises(InvalidRequest, match="cannot be enforced"):
        make_matcher(form, Function(name="f", parameters=parameters, is_strict=True))


def test_definitions_that_refer_to_each_other_take_no_time_to_read() -> None:
    """Following every reference of every branch would take 2^64 steps."""
    both = {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}
    definitions = {"a": both, "b": {"anyOf": [*both["anyOf"], {"type": "string"}]}}
    function = make_function({"x": {"$ref": "#/$defs/a"}}, **{"$defs": definitions})
    assert accepts(TAGGED[0], function, one_value(TAGGED[0], "text"))
