"""Laws of grammars behind reasoning: they wait for its end, and what they take the reader reads the same way."""

import json
from collections.abc import Sequence

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.dialect import find_dialect
from cllm_core.text.expected_answer import ExpectedAnswer
from cllm_core.text.grammar import json_grammar
from cllm_core.text.reasoning.formats import REASONING_FORMATS, ReasoningFormat
from cllm_core.text.stream import OutputText, TextDelta
from cllm_core.text.tools.formats import find_format
from cllm_core.text.tools.functions import Function, FunctionCall
from cllm_core.text.tools.grammar import CallRules
from cllm_core.text.tools.reader import join_calls
from tests.text.factories import END, byte_level, id_of, make_codec
from tests.text.test_stream import make_output

GET = Function(name="get", parameters={"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]})
CALL = FunctionCall("get", '{"x": 1}')
BOB = json_grammar({"type": "object", "properties": {"name": {"enum": ["Bob"]}}, "required": ["name"]})
MAY = CallRules(functions=(GET,), is_required=False, is_parallel=True)
MUST = CallRules(functions=(GET,), is_required=True, is_parallel=True)
HERMES = find_format("hermes", None)
TAGGED = [form for form in REASONING_FORMATS if not form.has_channels]


class Model:
    """A tokenizer, with tags as tokens of their own or not, and the formats that its template shows."""

    def __init__(self, form: ReasoningFormat, *, tokens: Sequence[str], prompt: str = "") -> None:
        self.tokenizer: Tokenizer = byte_level()
        self.tokenizer.add_tokens([AddedToken(text, special=text.startswith("[")) for text in tokens])
        self.codec = make_codec(self.tokenizer)
        dialect = find_dialect(
            ChatTemplate("{{ messages }}"),
            self.codec,
            reasoning_format=form.name,
            tool_format="harmony" if form.has_channels else "hermes",
            end_ids=(id_of(self.tokenizer, END),),
        )
        self.expected: ExpectedAnswer = dialect.answer_to(prompt)

    def accepts(self, grammar: str, text: str) -> bool:
        matcher = LLMatcher(LLTokenizer(self.tokenizer.to_str()), grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = self.tokenizer.encode(text).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def read(self, text: str, *functions: Function) -> TextDelta:
        output = OutputText(self.codec, syntax=self.expected.syntax(functions))
        return output.push(make_output(tuple(self.tokenizer.encode(text).ids), "stop"))


each_form = pytest.mark.parametrize(
    "form", [f for f in TAGGED if f.tokens], ids=lambda form: form.name + form.answer_start
)
as_tokens = pytest.mark.parametrize("is_token", [True, False], ids=["tokens", "letters"])


def make_model(form: ReasoningFormat, *, is_token: bool, prompt: str = "") -> Model:
    return Model(form, tokens=(*form.tokens, "<tool_call>", "</tool_call>") if is_token else (), prompt=prompt)


@each_form
@as_tokens
def test_a_form_binds_the_answer_and_leaves_reasoning_free(form: ReasoningFormat, is_token: bool) -> None:
    for prompt, opening in (("", form.start), (form.start, "")):
        model = make_model(form, is_token=is_token, prompt=prompt)
        grammar = model.expected.grammar(None, BOB)
        thought = f'{opening}Bob? {{"name": 1}} <tool_call>\n'
        for gap in ("", "\n\n"):
            text = f'{thought}{form.end}{gap}{{"name": "Bob"}}'
            assert model.accepts(grammar, text)
            delta = model.read(text)
            assert (delta.reasoning, delta.text) == ('Bob? {"name": 1} <tool_call>', '{"name": "Bob"}')
        for text in (thought, f"{thought}{form.end}", f"{thought}{form.end}Bob", f"{thought}{form.end}\n{thought}"):
            assert not model.accepts(grammar, text), text
        assert model.accepts(grammar, '{"name": "Bob"}') == (not prompt)


@each_form
@as_tokens
def test_a_forced_call_comes_behind_reasoning(form: ReasoningFormat, is_token: bool) -> None:
    assert HERMES is not None
    model = make_model(form, is_token=is_token)
    grammar = model.expected.grammar(MUST, None)
    call = HERMES.write([CALL])
    assert model.accepts(grammar, call)
    assert model.accepts(grammar, f"{form.start}I call <tool_call>.\n{form.end}\n\n{call}")
    for text in (f"{form.start}Hm.{form.end}", f"{form.start}{call}", f"{form.start}Hm.{form.end}Well {call}"):
        assert not model.accepts(grammar, text)


@each_form
@as_tokens
def test_where_a_call_may_come_reasoning_text_and_calls_are_told_apart(form: ReasoningFormat, is_token: bool) -> None:
    assert HERMES is not None
    model = make_model(form, is_token=is_token)
    grammar = model.expected.grammar(MAY, None)
    call = HERMES.write([CALL])
    thought = f"{form.start}I could <tool_call>"
    for text, expected in (
        (f"{thought}{form.end}\n\nSure.\n{call}", ("I could <tool_call>", "Sure.", (CALL,))),
        (f"{thought}{form.end}{call}", ("I could <tool_call>", "", (CALL,))),
        (f"Sure.\n{call}", ("", "Sure.", (CALL,))),
        (f"{thought}{form.end}Sure.", ("I could <tool_call>", "Sure.", ())),
        (thought, ("I could <tool_call>", "", ())),
        ("Sure.", ("", "Sure.", ())),
    ):
        assert model.accepts(grammar, text), text
        delta = model.read(text, GET)
        assert (delta.reasoning, delta.text, join_calls(delta.calls)) == expected
    assert not model.accepts(grammar, f"Sure. <tool_call>\n{thought}")


@as_tokens
def test_where_the_prompt_has_ended_reasoning_the_grammar_binds_at_once(is_token: bool) -> None:
    model = make_model(TAGGED[-1], is_token=is_token, prompt="<think>\n\n</think>\n\n")
    assert model.expected.grammar(None, BOB) == BOB
    assert model.read("<think>x</think>").text == "<think>x</think>"


def test_tags_around_the_answer_may_stand_around_a_form() -> None:
    (form,) = (form for form in TAGGED if form.answer_start == "<response>")
    model = make_model(form, is_token=True)
    grammar = model.expected.grammar(None, BOB)
    text = '<think>Bob.</think>\n<response>{"name": "Bob"}</response>'
    assert model.accepts(grammar, text)
    assert json.loads(model.read(text).text) == {"name": "Bob"}
