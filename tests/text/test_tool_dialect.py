"""Laws of telling a model of functions: by its template where that can, in plain messages where it cannot."""

import pytest

from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.dialect import Dialect, find_dialect
from cllm_core.text.json_text import to_json
from cllm_core.text.tools.conversation import MadeCall, Turn
from cllm_core.text.tools.functions import Function, FunctionCall
from cllm_core.text.tools.skeleton import ToolFormatChoice
from tests.text.factories import END, byte_level, id_of, make_codec

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
NATIVE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>{{ c.id }}{{ c.function.name }}"arguments": '
    "{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ m.tool_call_id }}{% endfor %}"
)
MISTRAL = NATIVE.replace("<tool_call>", "[TOOL_CALLS] [")
UNKNOWN = NATIVE.replace("<tool_call>", "<call>")

GET = Function(name="get", description="Gets.", parameters={"type": "object", "properties": {}})
ASKED = Turn(role="user", content="Go")
CALLED = Turn(
    role="assistant",
    content="I will.",
    calls=(MadeCall("call_1", FunctionCall("get", '{"x": 1}')), MadeCall("call_2", FunctionCall("get", "{}"))),
)
RESULTS = [Turn(role="tool", content=text, call_id=f"call_{text}") for text in ("1", "2")]


def make_dialect(source: str, chosen: ToolFormatChoice = "auto") -> Dialect:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["[TOOL_CALLS]"])
    return find_dialect(
        ChatTemplate(source), make_codec(tokenizer), tool_format=chosen, end_ids=(id_of(tokenizer, END),)
    )


def render(source: str, turns: list[Turn], *functions: Function) -> str:
    return (
        make_dialect(source)
        .render(ChatTemplate(source), turns, functions, add_generation_prompt=True, template_kwargs=None)
        .text
    )


def test_a_template_that_knows_tools_writes_them_itself() -> None:
    prompt = render(NATIVE, [ASKED, CALLED, *RESULTS], GET)
    assert prompt == (
        '{"type": "function", "function": {"name": "get", "description": "Gets.", "parameters": {"type": "object", '
        '"properties": {}}}}<user>Go<assistant>I will.<tool_call>call_1get"arguments": {"x": 1}'
        '<tool_call>call_2get"arguments": {}<tool>1call_1<tool>2call_2'
    )


@pytest.mark.parametrize("source", [PLAIN, UNKNOWN])
def test_a_template_that_knows_no_tools_gets_plain_messages(source: str) -> None:
    prompt = render(source, [ASKED, CALLED, *RESULTS])
    assert prompt == (
        '<user>Go<assistant>I will.\n<tool_call>\n{"name": "get", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'
        "<user><tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    )


def test_arguments_nested_too_deeply_to_be_read_are_given_as_text() -> None:
    arguments = '{"x":' * 5000 + "1" + "}" * 5000
    turn = Turn(role="assistant", content="", calls=(MadeCall("call_1", FunctionCall("get", arguments)),))
    assert to_json(arguments) in render(NATIVE, [ASKED, turn])


def test_functions_are_described_in_the_system_message() -> None:
    alone = render(PLAIN, [ASKED], GET)
    behind = render(PLAIN, [Turn(role="system", content="Be kind."), ASKED], GET)
    assert alone.startswith("<system>You can call")
    assert behind.startswith("<system>Be kind.\n\nYou can call")
    for prompt in (alone, behind):
        assert '{"name": "get", "description": "Gets.", "parameters"' in prompt
        assert '<tool_call>\n{"name": "function_name", "arguments": {"parameter": "value"}}\n</tool_call>' in prompt
        assert prompt.endswith("<user>Go")


def test_a_template_without_system_messages_gets_the_description_before_the_users_words() -> None:
    prompt = render(NO_SYSTEM, [ASKED, CALLED], GET)
    assert prompt.startswith("<user>You can call")
    assert "\n\nGo<assistant>" in prompt


def test_without_functions_nothing_is_described() -> None:
    assert render(PLAIN, [ASKED]) == "<user>Go"
    assert render(NO_SYSTEM, [ASKED]) == "<user>Go"


def test_ids_are_shortened_for_templates_that_want_nine_characters() -> None:
    prompt = render(MISTRAL, [ASKED, CALLED, *RESULTS], GET)
    assert "[TOOL_CALLS] [000000000get" in prompt
    assert prompt.endswith("<tool>1000000000<tool>2000000001")


@pytest.mark.parametrize(
    ("source", "chosen", "name", "is_native"),
    [
        (NATIVE, "auto", "hermes", True),
        (MISTRAL, "auto", "mistral", True),
        (UNKNOWN, "auto", "hermes", False),
        (UNKNOWN, "llama3", "llama3", True),
        (PLAIN, "auto", "hermes", False),
        (PLAIN, "mistral", "mistral", False),
    ],
)
def test_the_template_decides_unless_a_format_is_chosen(
    source: str, chosen: ToolFormatChoice, name: str, is_native: bool
) -> None:
    dialect = make_dialect(source, chosen)
    support = dialect.support
    assert dialect.tool_format.name == name
    assert support.functions == support.calls == support.results == is_native


def test_the_vocabulary_tells_marks_and_what_else_is_text() -> None:
    dialect = make_dialect(MISTRAL)
    assert list(dialect.call_vocabulary.marks) == list(dialect.spelled.values()) == ["[TOOL_CALLS]"]
    assert dialect.call_vocabulary.visible_ids == (id_of(byte_level(), "<tool>"),)
