"""Laws of a dialect whose model reasons: earlier reasoning goes where the template looks; prompts tell the rest."""

import pytest
from tokenizers import AddedToken

from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.dialect import Dialect, find_dialect
from cllm_core.text.reasoning.formats import ReasoningFormatChoice
from cllm_core.text.tools.conversation import MadeCall, Turn
from cllm_core.text.tools.functions import Function, FunctionCall
from cllm_core.text.tools.skeleton import ToolFormatChoice
from cllm_core.text.tools.template_support import find_support
from tests.text.factories import END, byte_level, id_of, make_codec
from tests.text.tool_templates import DEEPSEEK_V31, HARMONY, QWEN3

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
GET = Function(name="get")
CALLS = (MadeCall("call_1", FunctionCall("get", "{}")), MadeCall("call_2", FunctionCall("get", '{"x": 1}')))
RESULTS = [Turn(role="tool", content=f"result {i}", call_id=f"call_{i}") for i in (1, 2)]
ASKED = Turn(role="user", content="Go")


def make_dialect(
    source: str, *, reasoning: ReasoningFormatChoice = "auto", tool_format: ToolFormatChoice = "auto"
) -> Dialect:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    return find_dialect(
        ChatTemplate(source),
        make_codec(tokenizer),
        tool_format=tool_format,
        reasoning_format=reasoning,
        end_ids=(id_of(tokenizer, END),),
    )


def render(source: str, turns: list[Turn], *functions: Function, **template_kwargs: object) -> str:
    prompt = make_dialect(source).render(
        ChatTemplate(source), turns, functions, add_generation_prompt=True, template_kwargs=template_kwargs
    )
    return prompt.text


@pytest.mark.parametrize(
    ("source", "fields"),
    [(QWEN3, ("reasoning_content",)), (HARMONY, ("thinking",)), (DEEPSEEK_V31, ()), (PLAIN, ())],
)
def test_a_template_shows_where_it_looks_for_reasoning(source: str, fields: tuple[str, ...]) -> None:
    with_variable = source + "{% if thinking %}{% endif %}"
    assert find_support(ChatTemplate(with_variable)).reasoning_fields == fields


def test_earlier_reasoning_is_given_where_the_template_looks_for_it() -> None:
    turns = [ASKED, Turn(role="assistant", content="Hi.", reasoning="A greeting."), ASKED]
    assert "<think>\nA greeting.\n</think>\n\nHi.<|im_end|>" in render(QWEN3, turns)
    assert "A greeting." not in render(PLAIN, turns)


def test_on_channels_each_call_is_a_message_and_reasoning_and_text_before_it_are_one() -> None:
    caller = Turn(role="assistant", content="I look.", calls=CALLS, reasoning="Two calls.")
    prompt = render(HARMONY, [ASKED, caller, *RESULTS], GET)
    said = [
        "Two calls.\n\nI look.<|end|>",
        "to=functions.get<|channel|>commentary json<|message|>{}<|call|>",
        "result 1",
    ]
    said += ['<|start|>assistant to=functions.get<|channel|>commentary json<|message|>{"x": 1}<|call|>', "result 2"]
    places = [prompt.index(text) for text in said]
    assert places == sorted(places)
    assert prompt.count("<|channel|>analysis<|message|>") == 1


@pytest.mark.parametrize(
    ("source", "reasoning", "tool_format", "found"),
    [
        (QWEN3, "auto", "auto", ("think", "hermes", True)),
        (QWEN3, "none", "auto", (None, "hermes", False)),
        (QWEN3, "mistral", "auto", ("mistral", "hermes", True)),
        (PLAIN, "auto", "auto", (None, "hermes", True)),
        (PLAIN, "think", "auto", ("think", "hermes", True)),
        (HARMONY, "auto", "auto", ("harmony", "harmony", True)),
        (HARMONY, "none", "auto", ("harmony", "harmony", False)),
        (HARMONY, "auto", "hermes", (None, "hermes", True)),
        (PLAIN, "auto", "harmony", ("harmony", "harmony", True)),
    ],
)
def test_calls_and_reasoning_are_both_on_channels_or_neither(
    source: str, reasoning: ReasoningFormatChoice, tool_format: ToolFormatChoice, found: tuple[str | None, str, bool]
) -> None:
    dialect = make_dialect(source, reasoning=reasoning, tool_format=tool_format)
    name = None if dialect.reasoning is None else dialect.reasoning.name
    assert (name, dialect.tool_format.name, dialect.separates_reasoning) == found


@pytest.mark.parametrize(("template_kwargs", "state"), [({}, "possible"), ({"enable_thinking": False}, "ended")])
def test_a_template_that_ends_reasoning_in_the_prompt_is_believed(
    template_kwargs: dict[str, object], state: str
) -> None:
    expected = make_dialect(QWEN3).answer_to(render(QWEN3, [ASKED], **template_kwargs)).reasoning
    assert expected is not None
    assert expected.state == state


def test_an_answer_without_calls_and_reasoning_is_not_looked_at() -> None:
    assert make_dialect(PLAIN).answer_to("").syntax() is None
    assert make_dialect(QWEN3).answer_to("").syntax() is not None
