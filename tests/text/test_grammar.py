"""Grammars match what they were written from, and what cannot be matched is refused with a reason."""

import random
import re
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from cllm_core.text.grammar import (
    choice_grammar,
    json_grammar,
    json_object_grammar,
    json_rule,
    regex_grammar,
    written_grammar,
)
from cllm_core.text.grammar_compiler import GrammarCompiler
from tests.text.factories import END, Family, byte_fallback, byte_level, id_of, make_codec, metaspace


@cache
def compiler(family: Family = byte_level) -> GrammarCompiler:
    tokenizer = family()
    return GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size(), (id_of(tokenizer, END),))


def ids_of(text: str) -> list[int]:
    return byte_level().encode(text, add_special_tokens=False).ids


def matches(grammar: str, text: str) -> bool:
    matcher, ids = compiler().matcher(grammar), ids_of(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (json_grammar(POINT), '{"x": 3}', '{"x": "3"}'),
        (json_grammar({**POINT, "x-guidance": {"whitespace_flexible": True}}), '{ "x":\n3 }', '{"x" 3}'),
        (json_object_grammar(), '{"a": [1, {"b": null}]}', "[1]"),
        (regex_grammar(r"a/b\d{2}"), "a/b42", "a/b4"),
        (regex_grammar("[ä-ü]+\n"), "äöü\n", "abc\n"),
        (choice_grammar(['say "no"', "naïve \N{BUTTERFLY}", "a\\b\n"]), "naïve \N{BUTTERFLY}", "naïve"),
        (choice_grammar(['say "no"', "a\\b\n"]), "a\\b\n", "say no"),
        (written_grammar('start: "a" B+\nB: "b"'), "abb", "a"),
        (written_grammar('root ::= "a" item+\nitem ::= [0-9]'), "a12", "ab"),
        (f'start: "f(" arguments ")"\narguments: {json_rule(POINT)}', 'f({"x": 1})', '{"x": 1}'),
    ],
)
def test_a_grammar_matches_what_it_was_written_from_and_nothing_else(grammar: str, good: str, bad: str) -> None:
    assert matches(grammar, good)
    assert not matches(grammar, bad)


@pytest.mark.parametrize("schema", [POINT, {"type": "object"}])
def test_json_is_written_on_one_line_unless_the_schema_says_otherwise(schema: dict[str, object]) -> None:
    assert not matches(json_grammar(schema), '{"x":3}')
    assert not matches(json_grammar(schema), '{\n"x": 3}')


@pytest.mark.parametrize("family", [byte_level, byte_fallback])
@pytest.mark.parametrize("seed", range(5))
def test_allowed_tokens_of_every_family_spell_a_text_that_matches(family: Family, seed: int) -> None:
    draw, codec = random.Random(seed), make_codec(family())
    end = id_of(family(), END)
    matcher = compiler(family).matcher(regex_grammar("[ab é]{3,12}"))
    ids: list[int] = []
    while not matcher.is_stopped():
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        token_id = draw.choice(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())
        if token_id == end:
            break
        ids.append(token_id)
        matcher.consume_token(token_id)
    assert re.fullmatch("[ab é]{3,12}", codec.detokenizer(continues_text=True).push(ids))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (json_grammar({"type": "array", "uniqueItems": True}), 'Unimplemented keys: ["uniqueItems"]'),
        (json_grammar({"type": "nonsense"}), "Invalid type: nonsense"),
        (json_grammar({"$ref": "https://example.com/schema"}), "https://example.com/schema"),
        (json_grammar({"$ref": "#"}), "no text can match it"),
        (regex_grammar("(a"), "unclosed group"),
        (regex_grammar("(?=a)b"), "look-around"),
        ("start: missing", 'at 1(8): unknown name: "missing"'),
        ("start: <|unheard_of|>", "unknown special token"),
        ("no grammar at all", "Expected token"),
        ("", "Empty grammar"),
    ],
)
def test_what_cannot_be_matched_is_refused_with_the_librarys_reason(grammar: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler().matcher(grammar, param="guided")
    assert str(caught.value).startswith("guided: ")
    assert reason in str(caught.value)
    assert caught.value.param == "guided"
    assert "start: %json" not in str(caught.value)


@pytest.mark.parametrize(
    "grammar",
    [
        "start: A\nA: /(.*a){100}/ & /(.*b){100}/ & /(.*c){100}/",
        json_grammar({"allOf": [{"type": "string", "pattern": f"(.*{c}){{10}}"} for c in "abcdefghij"]}),
    ],
)
def test_grammars_that_take_too_much_work_are_refused_soon(grammar: str) -> None:
    started = time.perf_counter()
    with pytest.raises(InvalidRequest):
        compiler().matcher(grammar)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("choices", [[], ["a", ""]])
def test_choices_without_text_are_refused(choices: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="at least one choice"):
        choice_grammar(choices)


def test_a_schema_that_cannot_be_written_as_json_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="cannot be written as JSON"):
        json_grammar({"const": float("nan")})
    with pytest.raises(InvalidRequest, match="x-guidance"):
        json_grammar({"x-guidance": 3})


def test_a_schema_too_deep_to_be_written_is_refused() -> None:
    schema: dict[str, object] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="recursion"):
        json_grammar(schema)


@pytest.mark.parametrize("write", [regex_grammar, lambda half: choice_grammar([half]), lambda half: half])
def test_half_a_surrogate_pair_is_refused(write: Callable[[str], str]) -> None:
    with pytest.raises(InvalidRequest):
        compiler().matcher(write("\ud800"))


def test_gbnf_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="GBNF"):
        written_grammar("root ::= (")


def test_matchers_of_one_grammar_do_not_share_their_progress() -> None:
    first, second = (compiler().matcher(choice_grammar(["abc"])) for _ in range(2))
    first.try_consume_tokens(ids_of("abc"))
    assert first.is_accepting()
    assert not second.is_accepting()


def test_a_model_without_end_of_sequence_cannot_serve_grammars() -> None:
    with pytest.raises(UnsupportedParameter, match="end-of-sequence"):
        GrammarCompiler(byte_level().to_str(), 300, ())


def test_a_tokenizer_that_the_library_cannot_read_serves_no_grammars() -> None:
    with pytest.raises(UnsupportedParameter, match="Metaspace"):
        compiler(metaspace)


def test_a_model_with_fewer_outputs_than_tokens_still_compiles_grammars() -> None:
    tokenizer = byte_level()
    small = GrammarCompiler(tokenizer.to_str(), tokenizer.get_vocab_size() - 5, (id_of(tokenizer, END),))
    assert small.matcher(choice_grammar(["yes"]))
