"""Grammars are compiled once, beside the engine's thread where they were prepared."""

import threading

import pytest

from cllm_core.engine.grammars import Grammars
from cllm_core.errors import InvalidRequest
from cllm_core.request import SamplingParams
from cllm_core.text.grammar import choice_grammar, regex_grammar
from cllm_core.text.grammar_compiler import GrammarCompiler
from tests.engine.factories import make_engine, make_request

GRAMMAR = choice_grammar(["yes", "no"])


def test_a_prepared_grammar_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    info, compile_anew, threads = make_engine("llama").info, GrammarCompiler._compile_anew, []

    def noted(compiler: GrammarCompiler, grammar: str) -> object:
        threads.append(threading.current_thread().name)
        return compile_anew(compiler, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile_anew", noted)
    grammars = Grammars()
    grammars.prepare(GRAMMAR, info, info).result()
    assert grammars.prepare(GRAMMAR, info, info).done()
    grammars.constraint(GRAMMAR, SamplingParams(), info, info)
    assert [name.startswith("grammar") for name in threads] == [True]


def test_what_is_wrong_with_a_grammar_shows_when_it_is_used() -> None:
    info, grammars = make_engine("llama").info, Grammars()
    grammars.prepare("no grammar", info, info).result()
    with pytest.raises(InvalidRequest):
        grammars.constraint("no grammar", SamplingParams(), info, info)


def test_an_engine_prepares_requests_that_have_a_grammar() -> None:
    engine = make_engine("llama")
    assert engine.prepare(make_request("plain", (3, 4))) is None
    prepared = engine.prepare(make_request("bound", (3, 4), SamplingParams(grammar=regex_grammar("a+"))))
    assert prepared is not None
    prepared.result()
