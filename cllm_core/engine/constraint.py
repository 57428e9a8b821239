"""Constraint: the grammar of one request while it is decoded. Host only, no torch.

It follows the accepted tokens, and walks drafts on copies of its matcher: a walk can neither spoil it nor has to be
taken back. What a mask at window position i allows depends on the accepted tokens and the draft before i alone, so it
is the mask of token-by-token decoding wherever that draft is accepted.

::

    window     x0       x1       x2       x3       x4          x0 accepted, x1..x4 draft
    grammar             legal    legal    refused
    mask       0        1        2        -        -           position 2 predicts the token in place of x3: no
                                                               prediction behind it can be accepted
"""

import time
from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher
from llguidance.numpy import fill_next_token_bitmask

Masks = npt.NDArray[np.int32]
"""[positions, words]: 32 tokens a word, the lowest bit first; 1 may be chosen."""

# In seconds of processor time, so that a busy machine ends no request. Masks of one row and step that take longer leave
# the rest of its window to the next step, and a single piece of work that takes this much longer ends the request: all
# other rows wait for it.
_STEP_SECONDS = 0.05
_PATIENCE_SECONDS = 1.0
QUICK_SECONDS = 0.001
"""Up to here a mask counts as quick: those of a whole window may be computed without a look at the clock."""


class Constraint:
    """What the grammar says of one output.

    Args:
        matcher: has consumed nothing; owned from here on.
        vocab_size: of the model.
        eos_token_ids: of the model, at least one; each of them ends the output where the grammar allows an end.
        min_tokens: output tokens before any of stop_token_ids may be chosen, unless nothing else is left.
        stop_token_ids: tokens that end the output.

    Attributes:
        error: why the output cannot go on, None while it can.
        is_quick: whether the masks of the last window took little time each.
        forced_ids: what has to come next, spelled as the tokenizer spells it; the model may choose other tokens for the
            same text. An end of the output that has to come is the last of them.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        min_tokens: int = 0,
        stop_token_ids: Iterable[int] = (),
    ) -> None:
        self._matcher = matcher
        self._eos_token_ids = tuple(eos_token_ids)
        self._min_tokens = min_tokens
        self._all = _words(np.arange(vocab_size), vocab_size)
        self._ends = _words(eos_token_ids, vocab_size)
        self._first_end = _words(eos_token_ids[:1], vocab_size)
        self._stops = _words([*eos_token_ids, *stop_token_ids], vocab_size)
        self._num_accepted = 0
        self._num_masked = 0
        self.error: str | None = None
        self.is_quick = False
        self.forced_ids = self._find_forced(matcher)

    @property
    def num_words(self) -> int:
        """Words of one mask."""
        return len(self._all)

    def redraft(self, draft: Sequence[int]) -> list[int]:
        """The draft with what is forced written into it: at its head, and wherever the grammar refuses a token.

        Tokens behind a refused one where nothing is forced stay as they are.
        """
        out = list(draft)
        self._overwrite(out, 0, self.forced_ids)
        walker = self._matcher.deep_copy()
        done = 0
        while True:
            done += self._walk(walker, out[done:])
            forced = self._find_forced(walker) if done < len(out) else ()
            if not forced or out[done] == forced[0]:
                return out
            self._overwrite(out, done, forced)

    def fill_masks(self, draft: Sequence[int], masks: Masks) -> int:
        """Write the masks of a window, up to the first draft token that the grammar refuses.

        Args:
            draft: n - 1 tokens.
            masks: [n, num_words], row i for the prediction after i draft tokens.

        Returns:
            Rows written; only as many predictions are taken by the `accept` that follows. 0 where `error` is set.
        """
        started = time.thread_time()
        self._num_masked = 0
        walker = self._matcher.deep_copy()
        while self.error is None and self._fill(walker, masks[self._num_masked]):
            self._num_masked += 1
            self._check_patience(started)
            if self._num_masked == len(masks) or time.thread_time() - started > _STEP_SECONDS:
                break
            if not self._walk(walker, draft[self._num_masked - 1 : self._num_masked]):
                break
        self.is_quick = time.thread_time() - started <= QUICK_SECONDS * self._num_masked
        self._require_masks(walker)
        return self._num_masked

    def legal_prefix(self, draft: Sequence[int]) -> tuple[LLMatcher, list[int]]:
        """A matcher at the start of the window, and the draft up to the first token that it would not go on with."""
        walker = self._matcher.deep_copy()
        text_ids = list(takewhile(self._is_text, draft))
        return walker, text_ids[: walker.validate_tokens(text_ids)]

    def take_masks(self, masks: Masks, walker: LLMatcher) -> int:
        """Finish masks that were computed along a legal prefix of the draft, one behind each of its tokens.

        Args:
            masks: [tokens of the prefix + 1, num_words], as the matcher allows; changed in place.
            walker: that computed them.

        Returns:
            As `fill_masks`.
        """
        is_open = self._restrict(masks)
        self._num_masked = 0 if walker.is_error() else int(is_open.cumprod().sum())
        self._require_masks(walker)
        return self._num_masked

    def clip(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a window's accepted tokens that were chosen under a mask."""
        return token_ids[: self._num_masked]

    def accept(self, token_ids: Sequence[int]) -> None:
        """Follow tokens that became part of the output."""
        started = time.thread_time()
        text_ids = list(takewhile(self._is_text, token_ids))
        if self._matcher.try_consume_tokens(text_ids) < len(text_ids):
            self.error = f"the grammar refuses a token that its mask allowed: {self._matcher.get_error()}"
            return
        self._num_accepted += len(token_ids)
        self.forced_ids = self._find_forced(self._matcher)
        self._check_patience(started)

    def _fill(self, matcher: LLMatcher, mask: npt.NDArray[np.int32]) -> bool:
        """Write one mask; False where it would allow nothing."""
        fill_next_token_bitmask(matcher, mask[None])
        return bool(self._restrict(mask[None], first=self._num_masked)[0]) and not matcher.is_error()

    def _restrict(self, masks: Masks, *, first: int = 0) -> npt.NDArray[np.bool_]:
        """Cut masks to what may be chosen; whether anything is left in each.

        Args:
            masks: [positions, num_words], changed in place.
            first: position of the window that the first of them is for.
        """
        masks &= self._all
        only_ends = ~_allows_any(masks & ~self._ends)
        masks[only_ends] &= self._first_end  # one way to end is enough, and a draft can know it
        num_early = self._min_tokens - self._num_accepted - first
        if num_early > 0:
            early = masks[:num_early]
            may_wait = ~only_ends[:num_early] & _allows_any(early & ~self._stops)
            early[may_wait] &= ~self._stops
        return _allows_any(masks)

    def _require_masks(self, walker: LLMatcher) -> None:
        if self._num_masked == 0 and self.error is None:
            self.error = f"the grammar leaves no token to choose: {walker.get_error() or 'none of the vocabulary fits'}"

    def _find_forced(self, matcher: LLMatcher) -> tuple[int, ...]:
        """Tokens that must follow, the end of the output included."""
        walker = matcher.deep_copy()
        forced = walker.compute_ff_tokens()
        if self._walk(walker, forced) < len(forced) or not walker.is_stopped() or walker.is_error():
            return tuple(forced)
        return (*forced, self._eos_token_ids[0])

    def _walk(self, matcher: LLMatcher, token_ids: Sequence[int]) -> int:
        """Consume tokens up to the first that ends the output or is refused; how many were consumed."""
        return matcher.try_consume_tokens(list(takewhile(self._is_text, token_ids)))

    def _is_text(self, token_id: int) -> bool:
        return token_id not in self._eos_token_ids

    def _check_patience(self, started: float) -> None:
        seconds = time.thread_time() - started
        if seconds > _PATIENCE_SECONDS:
            self.error = f"the grammar is too complex: one step of it took {seconds:.1f} s; simplify it"

    @staticmethod
    def _overwrite(out: list[int], start: int, token_ids: Sequence[int]) -> None:
        end = min(len(out), start + len(token_ids))
        out[start:end] = token_ids[: end - start]


def _allows_any(masks: Masks) -> npt.NDArray[np.bool_]:
    """[positions]: whether a mask allows a token."""
    allows: npt.NDArray[np.bool_] = np.bitwise_or.reduce(masks, axis=1) != 0
    return allows


def _words(token_ids: npt.ArrayLike, vocab_size: int) -> npt.NDArray[np.int32]:
    """A mask of exactly these tokens; [words]."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[np.asarray(token_ids, dtype=np.intp)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
