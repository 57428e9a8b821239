"""DraftChoice: for a running request, the source whose draft comes next.

Which source a request needs shows while it runs: the drafts of all are kept until the next ones are made, and the
source whose draft would have been confirmed further, lately, is used. A new request starts from what all before it
showed.
"""

from collections.abc import Sequence

import numpy as np

from cllm_core.engine.drafters.base import Proposal
from cllm_core.engine.ids import Ids

# Weight of a new observation: about the last ten drafts count. 0.1 and 0.2 did equally well (the log of tries).
_RATE = 0.1
# Of all requests together: a plain mean at first, in which the initial length counts as so many drafts.
_SHARED_RATE = 0.02
_NUM_PRIOR = 8
# Equal at first, where a tie goes to the source named first.
_INITIAL_LENGTH = 1.0


class SharedLengths:
    """Tokens of each source's drafts that were confirmed, over all requests; running means.

    Args:
        num_sources: sources that there are.
    """

    def __init__(self, num_sources: int) -> None:
        self.lengths = [_INITIAL_LENGTH] * num_sources
        self._num_seen = [_NUM_PRIOR] * num_sources

    def observe(self, source: int, length: int) -> None:
        """Learn from a draft of a source."""
        self._num_seen[source] += 1
        rate = max(_SHARED_RATE, 1 / self._num_seen[source])
        self.lengths[source] += rate * (length - self.lengths[source])


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
        """Whether no other source was confirmed further lately."""
        return self._lengths[source] >= max(self._lengths)

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
        return max(trusted or offered, key=lambda source: self._lengths[source])

    def _observe(self, accepted: Ids) -> None:
        for source, draft in enumerate(self._drafts):
            if draft is not None:
                length = _num_equal(draft.tokens, accepted)
                self._lengths[source] += _RATE * (length - self._lengths[source])
                self._shared.observe(source, length)


def _num_equal(draft: Ids, accepted: Ids) -> int:
    """Tokens that both begin with."""
    length = min(len(draft), len(accepted))
    wrong = np.flatnonzero(draft[:length] != accepted[:length])
    return int(wrong[0]) if len(wrong) else length
