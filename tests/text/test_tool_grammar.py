"""Laws of the grammar: it takes what the format writes and nothing else, and the reader reads all that it takes."""

import json
from collections.abc import Sequence

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from cllm_core.errors import InvalidRequest
from cllm_core.text.lark import Vocabulary
from cllm_core.text.tools.formats import DEFAULT_FORMAT
from cllm_core.text.tools.functions import Function, FunctionCall
from cllm_core.text.tools.grammar import CallRules, calls_grammar
from cllm_core.text.tools.skeleton import MAX_CALLS, ToolFormat
from tests.text.factories import byte_level, id_of
from tests.text.tool_functions import SEQUENTIAL

WEATHER = Function(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
)
TIME = Function(name="get")
CALL = FunctionCall("get_weather", '{"city": "<Köln>", "days": 3}')
NOW = FunctionCall("get", "{}")

MARKS = {"as text": (), "as tokens": sorted({mark for form in SEQUENTIAL for mark in form.tokens})}


def make_tokenizer(marks: Sequence[str]) -> Tokenizer:
    tokenizer = byte_level()
    # Checkpoints have them in either form.
    tokenizer.add_tokens([AddedToken(mark, special=mark.startswith("[")) for mark in [*marks, "<think>"]])
    return tokenizer


def accepts(grammar: str, text: str, tokenizer: Tokenizer) -> bool:
    """Whether a model may write this text, whole."""
    matcher = LLMatcher(LLTokenizer(tokenizer.to_str()), grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def make_grammar(tool_format: ToolFormat, tokenizer: Tokenizer, **changes: object) -> str:
    rules = {"functions": (WEATHER, TIME), "is_required": False, "is_parallel": True, **changes}
    marks = {text: i for text in tool_format.tokens if (i := tokenizer.token_to_id(text)) is not None}
    vocabulary = Vocabulary(marks=marks, visible_ids=(id_of(tokenizer, "<think>"), id_of(tokenizer, "<tool>")))
    return calls_grammar(tool_format, CallRules(**rules), vocabulary)  # type: ignore[arg-type]


@pytest.fixture(params=MARKS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(MARKS[request.param])


every_format = pytest.mark.parametrize("tool_format", SEQUENTIAL, ids=lambda form: f"{form.name} {form.first}")


@every_format
def test_without_need_text_and_calls_are_both_taken(tool_format: ToolFormat, tokenizer: Tokenizer) -> None:
    grammar = make_grammar(tool_format, tokenizer)
    calls = tool_format.write([CALL, NOW])
    before = "Let me see. " if tool_format.marker else "\n"
    for text in ("", "Hi, you.", "<think>Hm.</x> <tool_", '{"name": "Bob"}', calls, before + calls):
        assert accepts(grammar, text, tokenizer), text
    for text in (calls + " So.", calls + "<think>", calls[:-3]):
        assert not accepts(grammar, text, tokenizer), text


@every_format
def test_a_marker_is_followed_by_a_call_of_a_known_function(tool_format: ToolFormat, tokenizer: Tokenizer) -> None:
    grammar = make_grammar(tool_format, tokenizer)
    other = tool_format.write([FunctionCall("other", "{}")])
    # Where calls have no marker, this is text like any other.
    assert accepts(grammar, other, tokenizer) == (tool_format.marker is None)


@every_format
def test_a_required_call_leaves_no_room_for_text(tool_format: ToolFormat, tokenizer: Tokenizer) -> None:
    grammar = make_grammar(tool_format, tokenizer, is_required=True)
    assert accepts(grammar, tool_format.write([CALL]), tokenizer)
    assert accepts(grammar, tool_format.write([NOW, CALL, NOW]), tokenizer)
    for text in ("", "Hi", "Hi " + tool_format.write([CALL])):
        assert not accepts(grammar, text, tokenizer)


@every_format
@pytest.mark.parametrize("is_required", [False, True])
def test_one_call_is_all_where_calls_are_not_parallel(
    tool_format: ToolFormat, tokenizer: Tokenizer, is_required: bool
) -> None:
    grammar = make_grammar(tool_format, tokenizer, is_required=is_required, is_parallel=False)
    assert accepts(grammar, tool_format.write([CALL]), tokenizer)
    assert not accepts(grammar, tool_format.write([CALL, NOW]), tokenizer)


@pytest.mark.parametrize("is_required", [False, True])
def test_parallel_calls_come_to_an_end(is_required: bool) -> None:
    """Small models repeat a call for as long as they may."""
    tokenizer = make_tokenizer(())
    grammar = make_grammar(DEFAULT_FORMAT, tokenizer, is_required=is_required)
    assert accepts(grammar, DEFAULT_FORMAT.write([NOW] * MAX_CALLS), tokenizer)
    assert not accepts(grammar, DEFAULT_FORMAT.write([NOW] * (MAX_CALLS + 1)), tokenizer)


@every_format
def test_only_the_functions_of_the_rules_are_called(tool_format: ToolFormat, tokenizer: Tokenizer) -> None:
    grammar = make_grammar(tool_format, tokenizer, is_required=True, functions=(TIME,))
    assert accepts(grammar, tool_format.write([NOW]), tokenizer)
    assert not accepts(grammar, tool_format.write([CALL]), tokenizer)


@pytest.mark.parametrize(
    ("arguments", "is_valid"),
    [
        ({"city": "x"}, True),
        ({"city": "x", "days": 3}, True),
        ({"days": 3}, False),
        ({"city": 5}, False),
        ({"city": "x", "days": "3"}, False),
        ({"city": "x", "colour": "red"}, False),
    ],
)
def test_arguments_match_the_functions_schema(arguments: dict[str, object], is_valid: bool) -> None:
    tokenizer = make_tokenizer(())
    text = DEFAULT_FORMAT.write([FunctionCall("get_weather", json.dumps(arguments))])
    assert accepts(make_grammar(DEFAULT_FORMAT, tokenizer), text, tokenizer) == is_valid


def test_parameters_left_out_are_none_and_an_empty_schema_is_any_object() -> None:
    tokenizer = make_tokenizer(())
    anything = Function(name="any", parameters={})
    grammar = make_grammar(DEFAULT_FORMAT, tokenizer, functions=(anything, TIME))
    for name, is_valid in (("any", True), ("get", False)):
        assert accepts(grammar, DEFAULT_FORMAT.write([FunctionCall(name, '{"x": [1]}')]), tokenizer) == is_valid


def test_a_marker_that_is_a_token_cannot_be_spelled_by_others() -> None:
    tokenizer = make_tokenizer(MARKS["as tokens"])
    matcher = LLMatcher(LLTokenizer(tokenizer.to_str()), make_grammar(DEFAULT_FORMAT, tokenizer))
    letters = [id_of(tokenizer, char) for char in "<tool_call>"]
    assert matcher.try_consume_tokens(letters) == len(letters) - 1


BOB = 'start: %json {"type": "object", "properties": {"name": {"enum": ["Bob"]}}, "required": ["name"]}'


@every_format
def test_content_may_have_to_match_a_grammar_of_its_own(tool_format: ToolFormat, tokenizer: Tokenizer) -> None:
    if tool_format.marker is None:
        with pytest.raises(InvalidRequest, match="cannot be told"):
            make_grammar(tool_format, tokenizer, content=BOB)
        return
    grammar = make_grammar(tool_format, tokenizer, content=BOB)
    assert accepts(grammar, '{"name": "Bob"}', tokenizer)
    assert accepts(grammar, tool_format.write([CALL, NOW]), tokenizer)
    assert not accepts(grammar, "Hi", tokenizer)


@pytest.mark.parametrize("is_strict", [False, True])
def test_what_cannot_be_enforced_is_refused_only_where_it_is_strict(is_strict: bool) -> None:
    tokenizer = make_tokenizer(())
    odd = Function(name="odd", parameters={"type": "object", "propertyNames": {"minLength": 2}}, is_strict=is_strict)
    grammar = make_grammar(DEFAULT_FORMAT, tokenizer, functions=(odd,))
    matcher = LLMatcher(LLTokenizer(tokenizer.to_str()), grammar)
    assert matcher.is_error() == is_strict
