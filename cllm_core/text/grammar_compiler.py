"""Compiles grammars for one vocabulary, within bounds of work and memory. Used by the API process to refuse bad ones,
and by the engine to follow good ones; neither needs torch for it."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from cllm_core.errors import InvalidRequest, UnsupportedParameter

CACHE_SIZE = 32
"""Grammars kept compiled, per vocabulary. A hostile one holds up to _MAX_LEXER_STATES states of 1-2 kB each."""

_MAX_LEXER_STATES = 20_000

_MAX_REASON_CHARS = 500
# llguidance repeats the grammar's line behind its reason, and parser internals behind a blank line.
_ECHO = re.compile(r"\n\s*\d+ \| .*|\n<(state|non-verbose).*", re.DOTALL)
_UNIMPLEMENTED = re.compile(r"^Unimplemented keys: (\[.*\])$")
# Where only one rule was written by us, the place in it tells the client nothing.
_OWN_PLACE = re.compile(r"^at 1\(\d+\): (?=failed to compile JSON schema|invalid regex)")


class GrammarCompiler:
    """Knows the vocabulary that grammars choose from. Threads may share it.

    Args:
        tokenizer_json: of the model, as in TokenizerBundle.
        vocab_size: of the model; the tokenizer's own may be smaller.
        eos_token_ids: tokens that end an output.

    Raises:
        UnsupportedParameter: the model has no token to end an output with, so no output could match a grammar; or its
            tokenizer is of a kind that llguidance cannot read.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        if not eos_token_ids:
            raise UnsupportedParameter("grammar: this model has no end-of-sequence token", param="grammar")
        self._tokenizer = _read(tokenizer_json, vocab_size, list(eos_token_ids))
        self._limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        self._compile = lru_cache(CACHE_SIZE)(self._compile_anew)

    def matcher(self, grammar: str, *, param: str = "grammar") -> LLMatcher:
        """A matcher that has consumed nothing; other threads run meanwhile.

        Args:
            grammar: Lark, as in SamplingParams.
            param: request field that it came from, for the error.

        Raises:
            InvalidRequest: it cannot be compiled, takes too much work, or no text matches it.
        """
        compiled = self._compile(grammar)
        if compiled.is_error():
            raise InvalidRequest(f"{param}: {_reason(compiled.get_error())}", param=param)
        return compiled.deep_copy()

    def unenforced(self, grammar: str) -> tuple[str, ...]:
        """Keywords of the JSON schemas of a grammar that compiles, which its lenient mode left out; each once."""
        warnings = self._compile(grammar).get_grammar_warnings()
        return tuple(dict.fromkeys(name for warning in warnings for name in _keywords(warning)))

    def _compile_anew(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            # Most of the work is done when first needed; what is too much for a mask shows here.
            matcher.compute_bitmask()
        return matcher


def _read(tokenizer_json: str, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    try:
        try:
            return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos_token_ids)
        except ValueError:  # more tokens than the model has outputs: those beyond are masked out by whoever applies
            return LLTokenizer(tokenizer_json, eos_token=eos_token_ids)
    except ValueError as error:
        raise UnsupportedParameter(f"grammar: not with this model's tokenizer ({error})", param="grammar") from error


def _keywords(warning: str) -> list[str]:
    """The keywords that a warning of llguidance's lenient mode is about."""
    if listed := _UNIMPLEMENTED.search(warning):
        return list(map(str, json.loads(listed[1])))
    return ["oneOf"] if warning.startswith("oneOf") else ["format"] if "format" in warning else ["schema"]


def _reason(error: str) -> str:
    """llguidance's reason without its echo of the grammar."""
    reason = _OWN_PLACE.sub("", _ECHO.sub("", error)).strip()
    if reason.startswith("NoExtension"):
        return "no text can match it"
    return reason if len(reason) <= _MAX_REASON_CHARS else reason[:_MAX_REASON_CHARS] + " ..."
