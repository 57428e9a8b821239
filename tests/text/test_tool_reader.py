"""Laws of reading calls: nothing depends on how the text was cut, and no mark of a call is ever content."""

import json
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cllm_core.errors import EngineFailed
from cllm_core.text.tools.formats import DEFAULT_FORMAT, find_format
from cllm_core.text.tools.functions import FunctionCall
from cllm_core.text.tools.reader import CallReader, join_calls
from cllm_core.text.tools.skeleton import WHITE_SPACE, ToolFormat, ToolFormatName
from tests.text.strategies import cut, cuts
from tests.text.tool_functions import FUNCTIONS, NAMES, SEQUENTIAL, calls, can_write

contents = st.text(alphabet=st.sampled_from('Hi é\n<|tool_c>[TOL{"name": get('), max_size=30)


def read(tool_format: ToolFormat, pieces: list[str]) -> tuple[str, tuple[FunctionCall, ...]]:
    reader = CallReader(tool_format, FUNCTIONS)
    parts = [reader.push(piece) for piece in pieces]
    content = "".join(part.content for part in parts) + reader.flush()
    return content, join_calls([delta for part in parts for delta in part.calls])


def has_marker(tool_format: ToolFormat, text: str) -> bool:
    markers = tool_format.markers(NAMES)
    return any(
        marker in text if tool_format.marker else text.lstrip(WHITE_SPACE).startswith(marker) for marker in markers
    )


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(SEQUENTIAL), contents, st.lists(calls, min_size=1, max_size=3), cuts(200))
def test_calls_and_content_are_read_back_however_the_text_is_cut(
    tool_format: ToolFormat, content: str, made: list[FunctionCall], at: list[int]
) -> None:
    assume(all(can_write(tool_format, call) for call in made))
    assume(not has_marker(tool_format, content))
    content = content.rstrip(WHITE_SPACE) if tool_format.marker else ""
    text = content + "\n" + tool_format.write(made)
    assert read(tool_format, cut(text, at)) == (content, tuple(made))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(SEQUENTIAL), contents, cuts(30))
def test_text_without_a_marker_is_content_to_its_last_character(
    tool_format: ToolFormat, text: str, at: list[int]
) -> None:
    if not has_marker(tool_format, text):
        assert read(tool_format, cut(text, at)) == (text, ())


@pytest.mark.parametrize("tool_format", SEQUENTIAL, ids=lambda form: form.first)
def test_a_cut_call_gives_what_there_is_of_it(tool_format: ToolFormat) -> None:
    text = tool_format.write([FunctionCall("get", '{"tags": [1, "}"]}'), FunctionCall("a-1", "{}")])
    read_so_far = [read(tool_format, [text[:end]]) for end in range(len(text))]
    for (content, before), (_, after) in pairwise(read_so_far):
        assert not has_marker(tool_format, content)
        assert len(before) <= len(after)
    last = read_so_far[-1][1]
    assert [call.name for call in last] == ["get", "a-1"]
    assert json.loads(last[0].arguments) == {"tags": [1, "}"]}


@pytest.mark.parametrize("tool_format", SEQUENTIAL, ids=lambda form: form.first)
def test_calls_that_are_required_leave_no_content_wherever_they_are_cut(tool_format: ToolFormat) -> None:
    text = tool_format.write([FunctionCall("get", "{}")])
    for end in range(len(text) + 1):
        reader = CallReader(tool_format, FUNCTIONS, is_required=True)
        first, second = reader.push(text[: end // 2]), reader.push(text[end // 2 : end])
        assert (first.content, second.content, reader.peek("x"), reader.flush()) == ("", "", "", "")


def test_a_call_begins_with_its_name_and_no_arguments() -> None:
    reader = CallReader(DEFAULT_FORMAT, FUNCTIONS)
    first, *rest = reader.push(DEFAULT_FORMAT.write([FunctionCall("get", '{"x": 1}')])).calls
    assert (first.index, first.name, first.arguments) == (0, "get", "")
    assert [delta.name for delta in rest] == [None]


def test_a_draft_shows_content_only_and_changes_nothing() -> None:
    reader = CallReader(DEFAULT_FORMAT, FUNCTIONS)
    assert reader.push("Let me").content == "Let me"
    assert reader.peek(" see\n<tool_call>\n{") == " see"
    assert reader.peek(" see <too") == " see"
    assert reader.push(" look").content == " look"
    reader.push("<tool_call>")
    assert (reader.is_calling, reader.peek("x")) == (True, "")


@pytest.mark.parametrize(
    "text", ['<tool_call>{"name"', '<tool_call>\n{"name": "get", "arguments": {}}</tool_call> and']
)
def test_a_text_that_leaves_the_format_behind_a_marker_is_an_error(text: str) -> None:
    with pytest.raises(EngineFailed, match="left its format"):
        read(DEFAULT_FORMAT, [text])


@pytest.mark.parametrize(
    ("template", "first"),
    [
        ("""{{ '<tool_call>\\n{"name": "' + name + '", "arguments": ' }}""", "<tool_call>"),
        (r"""{{ "<tool_call>\n{\"name\": \"" + name + "\", \"arguments\": " }}""", "<tool_call>"),
        ("""{{ 'ipython' }}{{ '{"name": "' + name + '", "parameters": ' }}""", '{"name": "'),
        ("{{ '[TOOL_CALLS] [' }}", "[TOOL_CALLS] ["),
        ("{{ '[TOOL_CALLS][' }}", "[TOOL_CALLS][{"),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", "[TOOL_CALLS]"),
        (r"{{- '\n<tool_call>\n<function=' + name + '>\n' }}", "<tool_call>\n<function="),
        ("<tool_call>\n<function={{ name }}>\n", "<tool_call>\n<function="),
        (r"{{ '<seed:tool_call>' + '\n<function=' + name }}", "<seed:tool_call>\n"),
        (r"""{{ '<minimax:tool_call>' + '\n<invoke name="' + name }}""", '<minimax:tool_call>\n<invoke name="'),
        ("<tool_call>{{ name }}\n<arg_key>{{ k }}</arg_key>\n<arg_value>", "<tool_call>"),
        ("<tool_call>{{ name }}<arg_key>{{ k }}</arg_key><arg_value>", "<tool_call>"),
        (
            r"{{ '<｜tool▁sep｜>' + name + '\n```json\n' }}",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        ),
        ("{{ '<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' }}", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"),
        ("Use the format [func_name1(a=1, b=2), func_name2(c=3)]", "["),
        ("{{ '<function_calls>' + name + '(' }}", "<function_calls>"),
        (r"{{ '<function_calls>\n' + name + '(' }}", "<function_calls>\n"),
        ("respond with <|tool_call|> and a JSON list", '<|tool_call|>[{"name": "'),
        ("{{ '<|tool|>' + tools + '<|/tool|>' }}", '<|tool_call|>[{"name": "'),
        ("""{{ '<|tool_call|>{"name": "f"}<|/tool_call|><|/tool|>' }}""", '<|tool_call|>{"name": "'),
        ("formatted as functools[...] <|/tool|>", 'functools[{"name": "'),
    ],
)
def test_a_chat_template_shows_its_format(template: str, first: str) -> None:
    found = find_format("auto", template)
    assert found is not None
    assert found.first.startswith(first)


def test_templates_of_one_family_show_which_of_its_forms_they_write() -> None:
    lines = find_format("auto", "<arg_key>{{ k }}</arg_key>\n<arg_value>")
    no_lines = find_format("auto", "<arg_key>{{ k }}</arg_key><arg_value>")
    assert lines is not None
    assert no_lines is not None
    call = FunctionCall("get", '{"text": "x"}')
    assert lines.write([call]) == "<tool_call>get\n<arg_key>text</arg_key>\n<arg_value>x</arg_value>\n</tool_call>"
    assert no_lines.write([call]) == "<tool_call>get<arg_key>text</arg_key><arg_value>x</arg_value></tool_call>"


@pytest.mark.parametrize("chosen", get_args(ToolFormatName))
def test_a_chosen_format_needs_no_template(chosen: ToolFormatName) -> None:
    for template in (None, "{{ messages }}", '<tool_call> "arguments": [TOOL_CALLS][ [ARGS]'):
        found = find_format(chosen, template)
        assert found is not None
        assert found.name == chosen


@pytest.mark.parametrize("template", [None, "{{ messages }}", "<|tool_calls_section_begin|>{{ name }}"])
def test_a_template_without_calls_or_with_others_shows_no_format(template: str | None) -> None:
    assert find_format("auto", template) is None


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(SEQUENTIAL),
    st.integers(0, 80),
    st.sampled_from(['"', "}", "<", ">", "\\", "]", "é", "0"]),
    cuts(150),
)
def test_a_damaged_call_is_read_or_refused_the_same_however_it_is_cut(
    tool_format: ToolFormat, position: int, damage: str, at: list[int]
) -> None:
    text = tool_format.write([FunctionCall("get", '{"tags": [1, "}"]}'), FunctionCall("a-1", "{}")])
    text = text[:position] + damage + text[position + 1 :]

    def outcome(pieces: list[str]) -> tuple[str, tuple[FunctionCall, ...]] | None:
        try:
            return read(tool_format, pieces)
        except EngineFailed:
            return None

    assert outcome(cut(text, at)) == outcome([text])
