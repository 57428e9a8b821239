"""Grammars: compiles the grammars of requests for the vocabularies that are served, on a thread beside the engine's."""

import contextlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from llguidance import LLMatcher

from cllm_core.engine.constraint import Constraint
from cllm_core.errors import RequestError
from cllm_core.info import AdapterInfo, ModelInfo
from cllm_core.request import SamplingParams
from cllm_core.text.grammar_compiler import CACHE_SIZE, GrammarCompiler

# Laid out for grammars at a time: the base's, and those of adapters that bring their own.
_NUM_VOCABULARIES = 4


class Grammars:
    """Makes constraints; what it compiled lately it still has."""

    def __init__(self) -> None:
        # A compiler is made for the first request that has a grammar, since laying out a vocabulary takes a while.
        self._compiler_of = lru_cache(maxsize=_NUM_VOCABULARIES)(GrammarCompiler)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._begun: OrderedDict[tuple[str, str], Future[None]] = OrderedDict()

    def prepare(self, grammar: str, base: ModelInfo, model: ModelInfo | AdapterInfo) -> Future[None]:
        """Begin to compile a grammar; what is wrong with it shows in `constraint`.

        Args:
            grammar: of the request.
            base: the model served.
            model: what the request asks for, the base or an adapter on it.
        """
        key = (model.name, grammar)
        if key not in self._begun:
            self._begun[key] = self._thread.submit(self._compile, grammar, base, model)
            if len(self._begun) > CACHE_SIZE:
                self._begun.popitem(last=False)
        self._begun.move_to_end(key)
        return self._begun[key]

    def constraint(
        self, grammar: str, params: SamplingParams, base: ModelInfo, model: ModelInfo | AdapterInfo
    ) -> Constraint:
        """What a grammar demands of one output; at once where it was prepared.

        Raises:
            InvalidRequest: the grammar cannot be compiled, or no text matches it.
            UnsupportedParameter: outputs of this model cannot follow grammars.
        """
        return Constraint(
            self._matcher(grammar, base, model),
            vocab_size=base.vocab_size,
            eos_token_ids=model.eos_token_ids,
            min_tokens=params.min_tokens,
            stop_token_ids=params.stop_token_ids,
        )

    def _compile(self, grammar: str, base: ModelInfo, model: ModelInfo | AdapterInfo) -> None:
        with contextlib.suppress(RequestError):
            self._matcher(grammar, base, model)

    def _matcher(self, grammar: str, base: ModelInfo, model: ModelInfo | AdapterInfo) -> LLMatcher:
        tokenizer_json = (model.tokenizer or base.tokenizer).tokenizer_json
        return self._compiler_of(tokenizer_json, base.vocab_size, model.eos_token_ids).matcher(grammar)
