"""DraftChoice: for a running request, the source whose draft comes next.

Which source a request needs shows while it runs: the drafts of all are kept until the next ones are made, and the
source whose draft would have been confirmed further, lately, is used. A new request starts from what all before it
showed.
"""

from collections.abc import Sequence

import numpy as np

from cllm_core.engine.drafters.base import NUM_KINDS, Proposal
from cllm_core.engine.ids import Ids

# Weight of a new observation: about the last ten drafts count. 0.1 and 0.2 did equally well (the log of tries).
_RATE = 0.1
# Of all requests together: a plain mean at first, in which the initial length counts as so many drafts.
_SHARED_RATE = 0.02
_NUM_PRIOR = 8
# Equal at first, where a tie goes to the source named first.
_INITIAL_LENGTH = 1.0


class SharedLengths:
    """Tokens of each source's drafts that were confirmed, by kind of draft, over all requests; running means.

    Args:
        num_sources: sources that there are.

    Attributes:
        lengths: of the drafts of each source and kind, NUM_KINDS for a source.
    """

    def __init__(self, num_sources: int) -> None:
        self.lengths = [_INITIAL_LENGTH] * (num_sources * NUM_KINDS)
        self._num_seen = [_NUM_PRIOR] * (num_sources * NUM_KINDS)

    def observe(self, index: int, length: int) -> None:
        """Learn from a draft, `index` that of its source and kind in `lengths`."""
        self._num_seen[index] += 1
        rate = max(_SHARED_RATE, 1 / self._num_seen[index])
        self.lengths[index] += rate * (length - self.lengths[index])


class DraftChoice:
    """What the sources were worth to one request.

    Args:
        shared: what they were worth to all.
    """

    def __init__(self, shared: SharedLengths) -> None:
        self._shared = shared
        self._lengths = list(shared.lengths)
        self._drafts: Sequence[Proposal | None] = ()
        self._text_end = 0  # tokens of the text that the drafts were made for

    def is_best(self, source: int) -> bool:
        """Whether no other source was confirmed further lately, by the kinds of drafts that they made last."""
        offered = [other for other, draft in enumerate(self._drafts) if draft is not None]
        return all(self._worth(source) >= self._worth(other) for other in offered)

    def choose(self, text: Ids, drafts: Sequence[Proposal | None]) -> int:
        """The source of the next draft, after learning how far each draft made before would have been confirmed.

        Args:
            text: [L] prompt and accepted output, at least as long as at the last call.
            drafts: of each source, filled up to the draft's length; None where it proposes nothing, not of all.

        Returns:
            Index of the source.
        """
        self._observe(text[self._text_end :])
        self._drafts, self._text_end = drafts, len(text)
        offered = [source for source, draft in enumerate(drafts) if draft is not None]
        trusted = [source for source in offered if (draft := drafts[source]) is not None and draft.is_trusted]
        return max(trusted or offered, key=self._worth)

    def _worth(self, source: int) -> float:
        """Tokens confirmed lately of such drafts as the source made last."""
        draft = self._drafts[source] if self._drafts else None
        return self._lengths[_index(source, draft)]

    def _observe(self, accepted: Ids) -> None:
        for source, draft in enumerate(self._drafts):
            if draft is not None:
                index, length = _index(source, draft), _num_equal(draft.tokens, accepted)
                self._lengths[index] += _RATE * (length - self._lengths[index])
                self._shared.observe(index, length)


def _index(source: int, draft: Proposal | None) -> int:
    """Of a source and the kind of its draft among lengths."""
    return source * NUM_KINDS + (0 if draft is None else draft.kind)


def _num_equal(draft: Ids, accepted: Ids) -> int:
    """Tokens that both begin with."""
    length = min(len(draft), len(accepted))
    wrong = np.flatnonzero(draft[:length] != accepted[:length])
    return int(wrong[0]) if len(wrong) else length
