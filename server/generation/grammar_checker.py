"""Checks the grammars that requests bring before the engine hears of them: off the event loop, and not for long."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cllm_core.errors import EngineBusy, InvalidRequest
from cllm_core.text.grammar_compiler import GrammarCompiler

from ..http.ignored import ignore_field
from ..served_models import LoadedModel

# A check that takes too long cannot be stopped: it keeps its thread until it is done, so these bound what all
# hostile clients together can take.
_NUM_THREADS = 2
# Vocabularies laid out for grammars: of the base and of adapters that bring their own.
_NUM_VOCABULARIES = 4
# Grammars of one vocabulary that are known to be good; each may be as long as a request's tools.
_NUM_PASSED = 32

_VocabularyKey = tuple[str, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class OutputForm:
    """A form that the output has to have.

    Attributes:
        param: the request field that demands it.
        write: the grammar; InvalidRequest where there is none.
        is_quick: writing takes about as long as checking the field's length did, so that the event loop may do it.
    """

    param: str
    write: Callable[[], str]
    is_quick: bool = False


@dataclass(frozen=True, slots=True)
class _Passed:
    """A grammar that compiles, and the keywords of its schemas that are not enforced."""

    grammar: str
    unenforced: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """One vocabulary laid out, and the grammars that passed lately with it, the latest last."""

    compiler: GrammarCompiler
    passed: OrderedDict[str, _Passed] = field(default_factory=OrderedDict)

    def recall(self, grammar: str) -> _Passed | None:
        if grammar in self.passed:
            self.passed.move_to_end(grammar)
        return self.passed.get(grammar)

    def remember(self, passed: _Passed) -> None:
        self.passed[passed.grammar] = passed
        if len(self.passed) > _NUM_PASSED:
            self.passed.popitem(last=False)


class GrammarChecker:
    """Writes grammars and compiles them for a model, those seen lately from memory. For one event loop.

    Args:
        max_seconds: that one check may take.
        observe: told the outcome of each: cached, compiled, refused, slow or busy.
    """

    def __init__(self, *, max_seconds: float, observe: Callable[[str], None] = lambda outcome: None) -> None:
        self._max_seconds = max_seconds
        self._observe = observe
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self._vocabularies: OrderedDict[_VocabularyKey, _Vocabulary] = OrderedDict()
        self._laying_out = asyncio.Lock()

    async def check(self, form: OutputForm, model: LoadedModel) -> str:
        """The grammar of a form, for SamplingParams; what it does not enforce of a schema is reported as ignored.

        Raises:
            InvalidRequest: it cannot be compiled, takes too long, or no text matches it.
            UnsupportedParameter: this model's outputs cannot follow grammars.
            EngineBusy: checks of others took all the time.
        """
        vocabulary = await self._vocabulary(model)
        written = _written(form) if form.is_quick else None
        passed = None if written is None else vocabulary.recall(written)
        if passed is None:
            passed = await self._check_in_thread(form, written, vocabulary.compiler)
            vocabulary.remember(passed)
            self._observe("compiled")
        else:
            self._observe("cached")
        for keyword in passed.unenforced:
            ignore_field(keyword, prefix=f"{form.param}.", reason="this keyword of a schema cannot be enforced")
        return passed.grammar

    async def _check_in_thread(self, form: OutputForm, written: str | None, compiler: GrammarCompiler) -> _Passed:
        started = self._pool.submit(_check, form, written, compiler)
        check = asyncio.wrap_future(started)
        try:
            done, _ = await asyncio.wait({check}, timeout=self._max_seconds)
            if done:
                return self._result(check)
            if started.running():
                self._observe("slow")
                raise InvalidRequest(
                    f"{form.param}: takes more than {self._max_seconds} s to compile; simplify it", param=form.param
                )
            self._observe("busy")
            raise EngineBusy(f"{form.param}: the server is busy compiling grammars of others; try again")
        finally:
            check.cancel()

    def _result(self, check: "asyncio.Future[_Passed]") -> _Passed:
        try:
            return check.result()
        except InvalidRequest:
            self._observe("refused")
            raise

    async def _vocabulary(self, model: LoadedModel) -> _Vocabulary:
        key = (model.tools.bundle.tokenizer_json, model.info.vocab_size, model.eos_token_ids)
        if key not in self._vocabularies:
            async with self._laying_out:  # each once, however many requests are the first to need it
                if key not in self._vocabularies:
                    # Not in the pool: this takes a while too, but ends, and must not queue behind what may not.
                    self._vocabularies[key] = _Vocabulary(await asyncio.to_thread(GrammarCompiler, *key))
                    if len(self._vocabularies) > _NUM_VOCABULARIES:
                        self._vocabularies.popitem(last=False)
        self._vocabularies.move_to_end(key)
        return self._vocabularies[key]


def _written(form: OutputForm) -> str:
    try:
        return form.write()
    except InvalidRequest as error:
        raise InvalidRequest(f"{form.param}: {error}", param=form.param) from error


def _check(form: OutputForm, written: str | None, compiler: GrammarCompiler) -> _Passed:
    grammar = _written(form) if written is None else written
    compiler.matcher(grammar, param=form.param)
    return _Passed(grammar, compiler.unenforced(grammar))
