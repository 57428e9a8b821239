"""RejectedPredictions: the source that recycles what the model predicted but did not confirm (arXiv:2512.14681).

Phrases that Jacobi decoding foresees are often right at another place than the one where they were predicted. They are
kept by the tokens before them, and proposed where the text comes to these.
"""

from collections.abc import Sequence

import numpy as np

from cllm_core.engine.drafters.base import DraftRow, Proposal, SeenWindow
from cllm_core.engine.drafters.past_index import PastIndex
from cllm_core.engine.request_text import RequestText

# Holds some 29,000 predictions, the latest, of all running requests together.
_NUM_BYTES = 2**20
# Kinds of proposals are told apart up to so many tokens that match.
_MOST_MATCHED = 3


class RejectedPredictions:
    """Drafter that keeps the unconfirmed predictions of each request, for that request alone."""

    name = "pool"

    def __init__(self) -> None:
        self._index = PastIndex(_NUM_BYTES)
        self._owners: dict[int, int] = {}  # by slot; each request is one
        self._num_requests = 0

    @property
    def num_bytes(self) -> int:
        """See Drafter."""
        return self._index.num_bytes

    def begin(self, slot: int, text: RequestText) -> None:
        """See Drafter."""
        self._num_requests += 1
        self._owners[slot] = self._num_requests

    def end(self, slot: int) -> None:
        """See Drafter."""

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        """See Drafter."""
        return [self._look_up(row) for row in rows]

    def observe(self, window: SeenWindow) -> None:
        """See Drafter."""
        # Behind the last token accepted, which was predicted as well.
        rejected = np.asarray(window.predicted_ids[window.num_accepted - 1 :], dtype=np.int64)
        if len(rejected) > 1:
            self._index.add(self._owners[window.slot], rejected, num_lead=1)

    def _look_up(self, row: DraftRow) -> Proposal | None:
        tokens, num_matched = self._index.find(self._owners[row.slot], row.text.tokens(0, row.text_end), row.num_tokens)
        return Proposal(tokens, kind=min(num_matched, _MOST_MATCHED)) if len(tokens) else None
