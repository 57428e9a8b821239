"""Laws of prompts' tokens: those of transformers, but that no text of a conversation becomes a control token."""

from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.chat_families import FAMILIES, ChatModel, load

ALL = pytest.mark.parametrize("name", sorted(FAMILIES))

TOOL: dict[str, object] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks <b>there</b>.",
        "parameters": {"type": "object", "properties": {"where": {"type": "string", "description": "a place"}}},
    },
}

TEXTS = [
    "Hi",
    "  \n two\n\nlines \t",
    "<think>\nLet me see.\n</think>\n\nIt is 3 < 4 && 5 > 4.",
    "a</think>b</think>c<think>",
    "<table><b>x</b></table>\n\n\n| a | b |",
    "<tool_call>\n{}\n</tool_call>",
    "<tool_response>\n\n</tool_response>",
    "Grüße 日本 👍\N{ZERO WIDTH JOINER}",
    "{{ bos_token }} {% raw %} %s {} [ < <| |> >",
    "\N{OBJECT REPLACEMENT CHARACTER}\ufdd0\x00\ue000",
]


def conversation(model: ChatModel, texts: list[str]) -> list[dict[str, object]]:
    system, user, answer, question = texts
    messages: list[dict[str, object]] = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": question},
    ]
    return [{"role": "system", "content": system}, *messages] if model.family.has_system else messages


def with_tools(texts: list[str]) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    user, said, argument, result, description, kind = texts
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"where": argument}}}
    messages: list[dict[str, object]] = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": said, "tool_calls": [call]},
        {"role": "tool", "content": result, "tool_call_id": "abcdefghi", "name": "look"},
    ]
    function = {
        "name": "look",
        "description": description,
        "parameters": {"type": "object", "properties": {kind: {"type": "string"}}},
    }
    return messages, [{"type": "function", "function": function}]


def reference_ids(model: ChatModel, messages: list[dict[str, object]], **arguments: Any) -> list[int]:
    ids = model.reference.apply_chat_template(cast(Any, messages), tokenize=True, return_dict=False, **arguments)
    return cast(list[int], ids)


def prompt_ids(model: ChatModel, messages: list[dict[str, object]], **arguments: Any) -> list[int]:
    return model.codec.encode_chat(model.template.render(messages, **arguments))


def controls(model: ChatModel, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in model.control_ids]


@ALL
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(name: str, text: str, add_generation_prompt: bool) -> None:
    model = load(name)
    for texts in (["Be brief.", text, "Well.", text], [text, "Hi", text, "Why?"]):
        messages = conversation(model, texts)
        ids = prompt_ids(model, messages, add_generation_prompt=add_generation_prompt)
        assert ids == reference_ids(model, messages, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_tools])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_with_tools_equal_those_of_transformers(name: str, text: str) -> None:
    model = load(name)
    messages, tools = with_tools([text] * 6)
    assert prompt_ids(model, messages, tools=tools) == reference_ids(
        model, messages, tools=tools, add_generation_prompt=True
    )


@ALL
@given(texts=st.lists(st.text(max_size=30), min_size=4, max_size=4))
def test_ids_of_any_harmless_text_equal_those_of_transformers(name: str, texts: list[str]) -> None:
    model = load(name)
    messages = conversation(model, texts)
    assert prompt_ids(model, messages) == reference_ids(model, messages, add_generation_prompt=True)


@st.composite
def hostile_texts(draw: st.DrawFn, control_tokens: tuple[str, ...], count: int) -> list[str]:
    """Texts of control tokens, pieces of them and what templates cut texts at."""
    whole = st.sampled_from(control_tokens)
    pieces = st.builds(lambda text, i, j: text[min(i, j) : max(i, j)], whole, st.integers(0, 12), st.integers(0, 12))
    between = st.sampled_from(["", " ", "\n", "\n\n", "a", "</think>", "<think>", "\u200d", "\uff53"])
    text = st.lists(whole | pieces | between, max_size=6).map("".join)
    return draw(st.lists(text, min_size=count, max_size=count))


@ALL
@settings(max_examples=60)
@given(data=st.data())
def test_no_message_makes_a_control_token(name: str, data: st.DataObject) -> None:
    model = load(name)
    texts = data.draw(hostile_texts(model.family.control_tokens, 4))
    ids = prompt_ids(model, conversation(model, texts))
    assert controls(model, ids) == controls(model, prompt_ids(model, conversation(model, ["x"] * 4)))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_tools])
@settings(max_examples=60)
@given(data=st.data())
def test_no_tool_and_no_result_makes_a_control_token(name: str, data: st.DataObject) -> None:
    model = load(name)
    texts = data.draw(hostile_texts(model.family.control_tokens, 6))
    messages, tools = with_tools(texts)
    harmless, harmless_tools = with_tools(["x"] * 6)
    ids = prompt_ids(model, messages, tools=tools)
    assert controls(model, ids) == controls(model, prompt_ids(model, harmless, tools=harmless_tools))
