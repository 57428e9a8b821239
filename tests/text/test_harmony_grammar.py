"""Laws of the grammar for messages on channels: reasoning is free, and the last message is what was asked for."""

from llguidance import LLMatcher, LLTokenizer

from cllm_core.text.reasoning.formats import REASONING_FORMATS
from tests.text.test_reasoning_grammar import BOB, CALL, MAY, MUST, Model

(HARMONY,) = (form for form in REASONING_FORMATS if form.has_channels)
THOUGHT = '<|channel|>analysis<|message|>{"name": 1}?<|end|><|start|>assistant'
PREAMBLE = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
MADE = "<|channel|>commentary to=functions.get <|constrain|>json<|message|>" + CALL.arguments


def make_model(*, is_token: bool = True, prompt: str = "<|start|>assistant") -> Model:
    return Model(HARMONY, tokens=HARMONY.tokens if is_token else (), prompt=prompt)


def test_a_form_binds_the_final_message() -> None:
    for is_token in (True, False):
        model = make_model(is_token=is_token)
        grammar = model.expected.grammar(None, BOB)
        for thoughts in ("", THOUGHT, THOUGHT * 3):
            assert model.accepts(grammar, thoughts + FINAL + '{"name": "Bob"}')
        for text in (THOUGHT, FINAL + "Bob", THOUGHT + MADE, PREAMBLE + FINAL + '{"name": "Bob"}'):
            assert not model.accepts(grammar, text), text


def test_a_forced_call_is_the_last_message() -> None:
    model = make_model()
    grammar = model.expected.grammar(MUST, None)
    for text in (MADE, THOUGHT + MADE):
        assert model.accepts(grammar, text)
    others = (
        FINAL + "Hi",
        THOUGHT + FINAL,
        PREAMBLE + MADE,
        MADE + "<|call|>",
        MADE.replace(".get", ".other"),
        THOUGHT,
    )
    for text in others:
        assert not model.accepts(grammar, text), text


def test_where_a_call_may_come_it_has_a_preamble_or_not() -> None:
    model = make_model()
    grammar = model.expected.grammar(MAY, None)
    for text in (MADE, THOUGHT + PREAMBLE + MADE, PREAMBLE + THOUGHT + MADE, THOUGHT + FINAL + "Hi", FINAL):
        assert model.accepts(grammar, text), text
    for text in (MADE.replace('"x": 1', '"x": "1"'), FINAL + "Hi" + "<|end|>", "Hi"):
        assert not model.accepts(grammar, text), text
    bound = model.expected.grammar(MAY, BOB)
    assert model.accepts(bound, THOUGHT + FINAL + '{"name": "Bob"}')
    assert not model.accepts(bound, THOUGHT + FINAL + "Hi")


def test_reasoning_that_the_prompt_has_begun_goes_on() -> None:
    model = make_model(prompt="<|start|>assistant<|channel|>analysis<|message|>")
    grammar = model.expected.grammar(MUST, None)
    assert model.accepts(grammar, "Hm.<|end|><|start|>assistant" + MADE)
    assert not model.accepts(grammar, MADE)


def test_what_a_grammar_takes_is_bounded_in_its_messages() -> None:
    """A model that thinks in message after message would run on to its limit."""
    model = make_model()
    grammar = model.expected.grammar(MUST, None)
    matcher = LLMatcher(LLTokenizer(model.tokenizer.to_str()), grammar)
    ids = model.tokenizer.encode(THOUGHT * 20).ids
    assert matcher.try_consume_tokens(ids) < len(ids)
