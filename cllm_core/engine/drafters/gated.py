"""GatedProposals: the source that a gated adapter feeds. Its rows are computed beside a window, in the same pass, and
propose what follows each length that may be accepted of it (see GatedBlocks). The base alone decides what is accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cllm_core.engine.drafters.base import DraftRow, Proposal, SeenWindow
from cllm_core.engine.ids import Ids
from cllm_core.engine.plan import GatedBlocks
from cllm_core.engine.request_text import RequestText

_SEED = 0


@dataclass(frozen=True, slots=True)
class _Proposed:
    """Tokens for the positions from `start` on."""

    start: int
    tokens: Ids


class GatedProposals:
    """Drafter that hands on what gated rows proposed.

    Args:
        noise_ids: tokens that noise is drawn from, uniformly.
        num_bytes: memory of the adapter.
    """

    name = "gated"

    def __init__(self, noise_ids: range, num_bytes: int = 0) -> None:
        self._noise_ids, self._num_bytes = noise_ids, num_bytes
        self._noise = np.random.default_rng(_SEED)
        self._proposed: dict[int, _Proposed] = {}  # by slot

    @property
    def num_bytes(self) -> int:
        """See Drafter."""
        return self._num_bytes

    def begin(self, slot: int, text: RequestText) -> None:
        """See Drafter."""
        self._proposed.pop(slot, None)

    def end(self, slot: int) -> None:
        """See Drafter."""
        self._proposed.pop(slot, None)

    def inputs(self, blocks: GatedBlocks, text: RequestText, text_end: int) -> Ids:
        """Tokens that the rows of blocks read, [lengths * size], behind a window that follows `text_end` tokens."""
        shape = len(blocks.lengths), blocks.size
        ids = self._noise.integers(self._noise_ids.start, self._noise_ids.stop, shape)
        if blocks.reads_draft:
            for row, length in zip(ids, blocks.lengths, strict=True):
                drafted = text.predicted(text_end + length, blocks.size)
                row[: len(drafted)] = drafted
        return ids.ravel()

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        """See Drafter."""
        offered = [self._behind(row.slot, row.text_end)[: row.num_tokens] for row in rows]
        return [Proposal(tokens) if len(tokens) else None for tokens in offered]

    def num_ready(self, slot: int, text_end: int) -> int:
        """Tokens that it would propose behind so many of a request."""
        return len(self._behind(slot, text_end))

    def observe(self, window: SeenWindow) -> None:
        """See Drafter."""
        found = _proposed_by_blocks(window) or self._left_over(window)
        if found is None:
            self._proposed.pop(window.slot, None)
        else:
            self._proposed[window.slot] = found

    def _left_over(self, window: SeenWindow) -> _Proposed | None:
        """What was proposed before, where the window accepted all of it that it tried."""
        before = self._behind(window.slot, window.text_end)
        accepted = window.predicted_ids[: min(window.num_accepted, len(before))]
        return (
            self._proposed[window.slot] if len(before) and np.array_equal(before[: len(accepted)], accepted) else None
        )

    def _behind(self, slot: int, text_end: int) -> Ids:
        """Proposed tokens from position `text_end` on."""
        found = self._proposed.get(slot)
        if found is None or found.start > text_end:
            return np.empty(0, dtype=np.int64)
        return found.tokens[text_end - found.start :]


def _proposed_by_blocks(window: SeenWindow) -> _Proposed | None:
    """What the block behind the accepted length proposes, or the nearest before it; None where there is none."""
    if window.gated is None:
        return None
    num_matched, size = window.num_accepted - 1, window.gated.size
    fitting = [length for length in window.gated.lengths if length <= num_matched]
    if not fitting:
        return None
    first = window.gated.lengths.index(max(fitting)) * size
    tokens = np.asarray(window.gated_ids[first : first + size], dtype=np.int64)
    return _Proposed(window.text_end + max(fitting) + 1, tokens)
