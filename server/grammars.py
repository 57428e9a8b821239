"""Checks the grammars that requests bring before the engine hears of them: off the event loop, and not for long."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from cllm_core.errors import EngineBusy, InvalidRequest
from cllm_core.text.grammar_compiler import GrammarCompiler
from server.models import LoadedModel
from server.schemas.structured import OutputForm

# A check that takes too long cannot be stopped: it keeps its thread until it is done, so these bound what all
# hostile clients together can take.
_NUM_THREADS = 2
# Vocabularies laid out for grammars: of the base and of adapters that bring their own.
_NUM_VOCABULARIES = 4


class GrammarChecker:
    """Writes grammars and compiles them for a model, those seen lately from memory.

    Args:
        max_seconds: that one check may take.
    """

    def __init__(self, *, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self._compiler_of = lru_cache(maxsize=_NUM_VOCABULARIES)(GrammarCompiler)

    async def check(self, form: OutputForm, model: LoadedModel) -> str:
        """The grammar of a form, for SamplingParams.

        Raises:
            InvalidRequest: it cannot be compiled, takes too long, or no text matches it.
            UnsupportedParameter: this model's outputs cannot follow grammars.
            EngineBusy: checks of others took all the time.
        """
        # Laying out a vocabulary takes a while too, but once, and is not the grammar's fault.
        compiler = await asyncio.get_running_loop().run_in_executor(self._pool, self._compiler, model)
        started = self._pool.submit(_check, form, compiler)
        check = asyncio.wrap_future(started)
        try:
            done, _ = await asyncio.wait({check}, timeout=self._max_seconds)
            if done:
                return check.result()
            if started.running():
                raise InvalidRequest(
                    f"{form.param}: takes more than {self._max_seconds} s to compile; simplify it", param=form.param
                )
            raise EngineBusy(f"{form.param}: others are being compiled; try again")
        finally:
            check.cancel()

    def _compiler(self, model: LoadedModel) -> GrammarCompiler:
        return self._compiler_of(model.tools.bundle.tokenizer_json, model.info.vocab_size, model.eos_token_ids)


def _check(form: OutputForm, compiler: GrammarCompiler) -> str:
    try:
        grammar = form.write()
    except InvalidRequest as error:
        raise InvalidRequest(f"{form.param}: {error}", param=form.param) from error
    compiler.matcher(grammar, param=form.param)
    return grammar
