"""PastIndex: what followed a few tokens in texts that ended, found by the longest match. Bounded; host only, no torch.

The texts lie in a ring of tokens, the latest over the oldest. Places where the same n-gram ends are chained, latest
first, as compressors of the LZ77 kind do it; there are chains for long n-grams and for short ones. All memory is taken
when the index is made.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from cllm_core.engine.ids import Ids

LONGEST = 16
"""Tokens that matches are compared by; beyond, longer ones are not better."""

LEAD = 8
"""Tokens before a text that it is found by, so that its beginning can be proposed."""

# Lengths of n-grams, the longer tried first: it finds what was said in the same situation, the shorter a phrase.
_ORDERS = (3, 1)
# Places looked at: more find longer matches, and take longer.
_NUM_PLACES = 24
_BETWEEN_TEXTS = -1
_NOWHERE = -1
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hash, for 64 bit
_MIN_TOKENS = 1024

# Of each token: itself and its text's owner; for each order a link, and heads of chains, one for two tokens.
BYTES_PER_TOKEN = 4 + 8 + len(_ORDERS) * (8 + 4)


class PastIndex:
    """Texts of several owners, who never see each other's.

    Args:
        num_bytes: memory to take, at most.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_tokens = max(_MIN_TOKENS, num_bytes // BYTES_PER_TOKEN)
        self._end = 0  # tokens written so far; the token at position p lies at p % num_tokens
        self._tokens = np.full(self.num_tokens, _BETWEEN_TEXTS, dtype=np.int32)
        self._owners = np.full(self.num_tokens, 0, dtype=np.uint64)
        self._links = [np.full(self.num_tokens, _NOWHERE, dtype=np.int64) for _ in _ORDERS]
        self._heads = [np.full(self.num_tokens // 2, _NOWHERE, dtype=np.int64) for _ in _ORDERS]

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        chains = sum(part.nbytes for part in (*self._links, *self._heads))
        return self._tokens.nbytes + self._owners.nbytes + chains

    def add(self, owner: int, text: Ids, *, num_lead: int) -> None:
        """Remember a text.

        Args:
            owner: 0..2**64 - 1.
            text: [L] tokens; of one longer than half of the index only the end is kept.
            num_lead: tokens at its head that it is found by, but which are not proposed.
        """
        dropped = max(0, len(text) - self.num_tokens // 2)
        text, num_lead = text[dropped:], max(0, num_lead - dropped)
        first = self._end
        places = np.arange(first, first + len(text) + 1) % self.num_tokens
        self._tokens[places[:-1]], self._tokens[places[-1]] = text, _BETWEEN_TEXTS
        self._owners[places] = owner
        self._end += len(text) + 1
        for order, links, heads in zip(_ORDERS, self._links, self._heads, strict=True):
            # The first that counts ends with the last token of the lead; the last one has a token behind it.
            start = max(order, num_lead) - 1
            if len(text) - 1 <= start:
                continue
            chains = self._chains(owner, _ngrams(text[:-1], order)[start - order + 1 :])
            for position, chain in enumerate(chains.tolist(), first + start):
                links[position % self.num_tokens] = heads[chain]
                heads[chain] = position

    def find(self, owner: int, text: Ids, num_tokens: int) -> tuple[Ids, int]:
        """What most often followed the longest match with a text's end; of equally frequent tokens the latest.

        Args:
            owner: of the texts to look in.
            text: [L] tokens.
            num_tokens: K.

        Returns:
            Up to K tokens, none where nothing matches, and the tokens that matched, at most LONGEST.
        """
        suffix = text[-LONGEST:]
        for order, links, heads in zip(_ORDERS, self._links, self._heads, strict=True):
            if len(suffix) < order:
                continue
            chain = int(self._chains(owner, suffix[None, -order:])[0])
            places = np.array(list(islice(self._walk(int(heads[chain]), links), _NUM_PLACES)), dtype=np.int64)
            if not len(places):
                continue
            matched = self._num_matched(owner, places, suffix)
            longest = int(matched.max())
            if longest >= order:
                return self._vote(places[matched == longest], num_tokens), longest
        return np.empty(0, dtype=np.int64), 0

    def _walk(self, position: int, links: np.ndarray) -> Iterator[int]:
        """The places of a chain, latest first, as far as they have not been written over."""
        while position != _NOWHERE and position >= self._end - self.num_tokens:
            yield position
            position = int(links[position % self.num_tokens])

    def _num_matched(self, owner: int, places: Ids, suffix: Ids) -> Ids:
        """[P] tokens of a suffix that end at each place; 0 at another owner's."""
        indices = (places[:, None] - np.arange(len(suffix))) % self.num_tokens
        equal = (self._tokens[indices] == suffix[::-1]) & (self._owners[indices] == np.uint64(owner))
        matched: Ids = np.cumprod(equal, axis=1).sum(axis=1)
        return matched

    def _vote(self, places: Ids, num_tokens: int) -> Ids:
        """The continuation of the most places, token by token; places that went on otherwise have no more say."""
        behind = places[:, None] + np.arange(1, num_tokens + 1)
        tokens = np.where(behind < self._end, self._tokens[behind % self.num_tokens], _BETWEEN_TEXTS)
        found: list[int] = []
        for index in range(num_tokens):
            if len(tokens) == 1:
                rest = tokens[0, index:]
                ends = np.flatnonzero(rest == _BETWEEN_TEXTS)
                found += rest[: ends[0] if len(ends) else None].tolist()
                break
            column = tokens[:, index]
            values, first_seen, counts = np.unique(column, return_index=True, return_counts=True)
            most = int(np.lexsort((first_seen, -counts))[0])
            if values[most] == _BETWEEN_TEXTS:
                break
            found.append(int(values[most]))
            tokens = tokens[column == values[most]]
        return np.array(found, dtype=np.int64)

    def _chains(self, owner: int, ngrams: Ids) -> Ids:
        """[N] chains of n-grams [N, order]."""
        mixed = np.full(len(ngrams), owner, dtype=np.uint64)
        for column in ngrams.T:
            mixed = (mixed ^ column.astype(np.uint64)) * _MULTIPLIER
            mixed ^= mixed >> np.uint64(29)
        return (mixed % np.uint64(len(self._heads[0]))).astype(np.int64)


def _ngrams(text: Ids, order: int) -> Ids:
    """[L - order + 1, order] n-grams of a text."""
    return np.lib.stride_tricks.sliding_window_view(text, order)
