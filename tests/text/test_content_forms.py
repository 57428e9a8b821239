"""Laws of content forms: a template is given texts or parts, as it was written for, and no text is lost."""

from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerFast

from cllm_core.text.chat_template import ChatTemplate
from tests.text import factories

# Of models that read images: no content that is a plain text.
PARTS_ONLY = """{% for message in messages %}
{{ message.role | capitalize }}{{ ':' if message.content[0].type == 'image' else ': ' }}
{% for part in message['content'] %}
{{ '<image>' if part['type'] == 'image' else part['text'] }}
{% endfor %}
{% endfor %}"""

# Only users show images; all else is a text.
PARTS_OF_USERS = """{% macro show(parts) %}{% for part in parts %}{{ part.text }}{% endfor %}{% endmacro %}
{% for m in messages %}{{ m.role }}={{ show(m.content) if m.role == 'user' else m.content + '.' }}
{% endfor %}"""

EITHER = """{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content | trim }}{% else %}
{% for part in m.content | selectattr('type', 'equalto', 'text') %}<{{ part.text }}>{% endfor %}
{% endif %}
{% endfor %}"""

TEXT_ONLY = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
PRINTED = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

STRICT = """{% if messages[0].role != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}
{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"""

TOOLS = """{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}
{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}{% endfor %}"""

SAID: list[dict[str, object]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Well?"},
    {"role": "user", "content": "Bye"},
]


def as_parts(*texts: object) -> list[dict[str, object]]:
    return [{"type": "text", "text": text} for text in texts]


HI_THERE: list[dict[str, object]] = [{"role": "user", "content": as_parts("hi", "there")}]


def in_parts(message: dict[str, object]) -> dict[str, object]:
    return {**message, "content": as_parts(message["content"])}


def render(source: str, messages: list[dict[str, object]]) -> str:
    return ChatTemplate(source).render(messages).text


def reference(source: str, messages: list[dict[str, object]]) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=factories.byte_level())
    return cast(str, tokenizer.apply_chat_template(cast(Any, messages), chat_template=source, tokenize=False))


@pytest.mark.parametrize("source", [PARTS_ONLY, TOOLS])
def test_a_template_that_walks_over_parts_is_given_parts(source: str) -> None:
    assert render(source, SAID) == reference(source, [in_parts(message) for message in SAID])


def test_each_role_has_a_form_of_its_own() -> None:
    expected = [in_parts(message) if message["role"] == "user" else message for message in SAID]
    assert render(PARTS_OF_USERS, SAID) == reference(PARTS_OF_USERS, expected)


def test_roles_that_a_template_refuses_hide_nothing_about_the_others() -> None:
    assert render(STRICT, SAID[1:]) == reference(STRICT, [in_parts(message) for message in SAID[1:]])


def test_an_empty_text_is_a_part_too() -> None:
    assert render(PARTS_ONLY, [{"role": "user", "content": ""}]).strip() == "User:"


@pytest.mark.parametrize("source", [EITHER, TEXT_ONLY, PRINTED])
def test_a_template_that_takes_texts_is_given_texts(source: str) -> None:
    assert render(source, SAID) == reference(source, SAID)


@pytest.mark.parametrize("source", [EITHER, PARTS_ONLY])
def test_a_template_that_takes_parts_is_given_the_clients_own(source: str) -> None:
    assert render(source, HI_THERE) == reference(source, HI_THERE)


@pytest.mark.parametrize("source", [TEXT_ONLY, PRINTED])
def test_parts_are_joined_by_line_breaks_where_a_template_takes_texts_only(source: str) -> None:
    assert render(source, HI_THERE) == "<user>hi\nthere"


def test_results_of_tools_are_given_as_parts_too() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": {}}}
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "seen", "tool_call_id": "a"},
    ]
    assert render(TOOLS, messages) == reference(TOOLS, [in_parts(message) for message in messages])


def test_parts_of_other_kinds_are_left_to_the_template() -> None:
    content = [{"type": "image"}, *as_parts("What is it?")]
    messages: list[dict[str, object]] = [{"role": "user", "content": content}]
    assert render(PARTS_ONLY, messages).split() == ["User:", "<image>", "What", "is", "it?"]
    assert render(PRINTED, messages) == f"<user>{content}"
