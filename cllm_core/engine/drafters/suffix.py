"""PastOutputs: the source that proposes what followed the last tokens in outputs that ended before.

Questions about one database, calls of one tool, forms of one template: servers say much again. Requests of another
adapter or cache salt are apart, so that nobody can tell by the speed of his answers what others were answered.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cllm_core.engine.block_pool import root_hash
from cllm_core.engine.drafters.base import DraftRow, Proposal, SeenWindow
from cllm_core.engine.drafters.past_index import LEAD, PastIndex
from cllm_core.engine.request_text import RequestText

# Kinds of proposals are told apart at these lengths of the match.
_KINDS = (2, 3, 4, 6, 12)


@dataclass(slots=True)
class _Growing:
    """An output that has not ended."""

    text: RequestText
    owner: int
    text_end: int


class PastOutputs:
    """Drafter that looks outputs up.

    Args:
        num_bytes: memory of the index, at most.
    """

    name = "suffix"

    def __init__(self, num_bytes: int) -> None:
        self._index = PastIndex(num_bytes)
        self._growing: dict[int, _Growing] = {}  # by slot

    @property
    def num_bytes(self) -> int:
        """See Drafter."""
        return self._index.num_bytes

    def begin(self, slot: int, text: RequestText) -> None:
        """See Drafter."""
        request = text.admission.request
        key = root_hash(cache_salt=request.cache_salt, adapter=request.adapter)
        self._growing[slot] = _Growing(text, int.from_bytes(key[:8], "little"), len(text.admission.token_ids))

    def end(self, slot: int) -> None:
        """See Drafter."""
        ended = self._growing.pop(slot)
        first = max(0, ended.text.num_prompt - LEAD)
        tokens = ended.text.tokens(first, ended.text_end)
        num_lead = ended.text.num_prompt - first
        stops = np.flatnonzero(np.isin(tokens[num_lead:], ended.text.admission.stop_token_ids))
        if len(stops):  # what was accepted behind the end is of no output
            tokens = tokens[: num_lead + stops[0] + 1]
        if len(tokens) > num_lead:
            self._index.add(ended.owner, tokens, num_lead=num_lead)

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        """See Drafter."""
        found = [
            self._index.find(self._growing[row.slot].owner, row.text.tokens(0, row.text_end), row.num_tokens)
            for row in rows
        ]
        return [
            Proposal(tokens, kind=bisect_right(_KINDS, num_matched)) if len(tokens) else None
            for tokens, num_matched in found
        ]

    def observe(self, window: SeenWindow) -> None:
        """See Drafter."""
        self._growing[window.slot].text_end = window.text_end + window.num_accepted
