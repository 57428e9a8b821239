"""Laws of chat templates: equal to transformers, and safe against clients and checkpoints."""

from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerFast

from cllm_core.errors import ConfigError, InvalidRequest
from cllm_core.text.chat_template import ChatTemplate
from tests.text import factories

SPECIAL_TOKENS = {"bos_token": factories.BOS, "eos_token": factories.END}

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% set turns = messages[1:] %}
{% else %}
{% set system = '' %}
{% set turns = messages %}
{% endif %}
{% for turn in turns %}
    {% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if turn['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + turn['content'].strip() + ' [/INST]' }}
    {% else %}
{{ ' ' + turn['content'].strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
"""

TOOLS = """{% set ns = namespace(calls=0) %}
{% if tools is not none %}
# Tools
{% for tool in tools %}
{{ tool | tojson }}
{{ tool.function.parameters | tojson(indent=2) }}
{% endfor %}
{% endif %}
{% for message in messages %}
{% for call in message.tool_calls or [] %}
{% set ns.calls = ns.calls + 1 %}
call {{ ns.calls }}: {{ call.function.name }}({{ call.function.arguments | tojson(sort_keys=true) }})
{% endfor %}
{{ message.role }}: {{ message.content }}
{% endfor %}
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{{ documents is none }}
"""

LOOP_CONTROLS = """{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{{ message.content }}
{% if loop.index == 3 %}{% break %}{% endif %}
{% endfor %}
"""

GENERATION = """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}
{% set shout = message.content | upper %}
{{ shout }}{{ eos_token }}
{% endgeneration %}
{% else %}
{{ message.content }}{{ shout }}
{% endif %}
{% endfor %}
"""

DATE = "{{ strftime_now('%Y') }} {{ dict(a=1) | tojson }} {{ '{% raw %}' }}"

CHAT: list[dict[str, object]] = [
    {"role": "system", "content": "Be brief <b>& kind</b>."},
    {"role": "user", "content": " Grüße 👍\n"},
    {"role": "assistant", "content": "I'm \"here\"\n", "tool_calls": [
        {"type": "function", "function": {"name": "look", "arguments": {"z": "<ü>", "a": [1, None, True]}}}
    ]},
    {"role": "user", "content": "{{ bos_token }}"},
]  # fmt: skip

WEATHER: dict[str, object] = {
    "type": "function",
    "function": {"name": "weather", "description": "<日本>", "parameters": {"type": "object", "properties": {}}},
}


def reference(source: str, messages: list[dict[str, object]], **arguments: Any) -> object:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=factories.byte_level(), **cast(Any, SPECIAL_TOKENS))
    chat = cast(Any, messages)  # annotated there as text only, but tool calls and content parts are taken
    return tokenizer.apply_chat_template(chat, chat_template=source, tokenize=False, **arguments)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("num_messages", [1, 2, 4])
@pytest.mark.parametrize("source", [CHATML, LLAMA_2, TOOLS, LOOP_CONTROLS, GENERATION, DATE])
def test_prompt_equals_that_of_transformers(source: str, num_messages: int, add_generation_prompt: bool) -> None:
    messages = CHAT[:num_messages]
    rendered = ChatTemplate(source, SPECIAL_TOKENS).render(messages, add_generation_prompt=add_generation_prompt)
    assert rendered.text == reference(source, messages, add_generation_prompt=add_generation_prompt)


def test_tools_and_further_variables_equal_those_of_transformers() -> None:
    further = {"enable_thinking": False, "documents": [{"title": "t", "text": "x"}]}
    rendered = ChatTemplate(TOOLS, SPECIAL_TOKENS).render(CHAT, [WEATHER], template_kwargs=further)
    assert rendered.text == reference(TOOLS, CHAT, tools=[WEATHER], add_generation_prompt=True, **further)
    assert "<日本>" in rendered.text


def test_messages_are_data_and_never_template_code() -> None:
    template = ChatTemplate("{{ messages[0].content }}", SPECIAL_TOKENS)
    assert template.render([{"role": "user", "content": "{{ bos_token }}"}]).text == "{{ bos_token }}"


def test_a_template_that_refuses_messages_tells_the_client_why() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate user/assistant") as caught:
        ChatTemplate(LLAMA_2, SPECIAL_TOKENS).render([{"role": "assistant", "content": "hi"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": 3}], [{}]])
def test_messages_that_a_template_was_not_written_for_are_the_clients_fault(messages: list[dict[str, object]]) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses these messages"):
        ChatTemplate(LLAMA_2, SPECIAL_TOKENS).render(messages)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token", "raise_exception"])
def test_a_client_cannot_set_what_the_server_sets(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"chat_template_kwargs sets {name}") as caught:
        ChatTemplate(CHATML, SPECIAL_TOKENS).render(CHAT, template_kwargs={name: "x", "harmless": 1})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("source", "effort", "is_enabled", "expected"),
    [
        ("{% if enable_thinking is defined %}{% endif %}", "none", None, {"enable_thinking": False}),
        ("{{ enable_thinking | default(true) }}", "low", None, {"enable_thinking": True}),
        ("{{ enable_thinking }}", "low", False, {"enable_thinking": False}),
        ("{{ enable_thinking }}", None, None, {}),
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}", "high", None, {"thinking": True}),
        ("{% set thinking = 1 %}{{ thinking }}", "high", None, {}),
        ("{% macro m() %}{{ reasoning_effort }}{% endmacro %}", "low", None, {"reasoning_effort": "low"}),
        ("{{ reasoning_effort }}", None, True, {}),
        (CHATML, "high", True, {}),
    ],
)
def test_effort_reaches_the_variables_that_a_template_looks_up(
    source: str, effort: str | None, is_enabled: bool | None, expected: dict[str, object]
) -> None:
    assert ChatTemplate(source).reasoning_kwargs(effort=effort, is_enabled=is_enabled) == expected


def test_variables_of_either_of_two_templates_count() -> None:
    template = ChatTemplate("{{ messages }}", tool_use="{{ thinking }}")
    assert template.reasoning_kwargs(effort="none") == {"thinking": False}


@pytest.mark.parametrize(
    ("source", "complaint"),
    [("{% if x %}", "Unexpected end"), ("a\n{{ x | nothing }}", "line 2: No filter named"), ("{{", "unexpected")],
)
def test_a_template_that_does_not_compile_is_a_config_error(source: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['x'] }}",
        "{{ messages[0].content.upper.__closure__[0] }}",
        "{{ messages[0].content['join'].__func__.__globals__ }}",
        "{{ messages[0].content._mask.hex() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{x[0].__class__.__mro__}'.format_map({'x': messages}) }}",
        "{{ (messages[0].content | attr('title')).__wrapped__.__self__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_hostile_template_stays_in_its_sandbox(source: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest):
        ChatTemplate(source).render(messages)
    assert messages == [{"role": "user", "content": "hi"}]
