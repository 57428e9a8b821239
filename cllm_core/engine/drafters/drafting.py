"""Drafting: writes the drafts of a step, each by the source that its request's choice names."""

from collections.abc import Sequence

import numpy as np

from cllm_core.engine.drafters.base import Drafter, DraftRow, Proposal, SeenWindow
from cllm_core.engine.drafters.choice import DraftChoice, SharedLengths
from cllm_core.engine.drafters.copies import KnownText
from cllm_core.engine.drafters.copying import copy_known
from cllm_core.engine.drafters.gated import GatedProposals
from cllm_core.engine.drafters.own import OwnPredictions
from cllm_core.engine.request_text import RequestText


def default_sources() -> tuple[Drafter, ...]:
    """Jacobi's own predictions, and copies of known text."""
    return OwnPredictions(), KnownText()


class Drafting:
    """Drafts of running requests.

    Args:
        sources: in the order in which they are preferred where nothing tells them apart; at least one of them proposes
            for every row.
        gated: the source that gated blocks feed, preferred to these; None: there is none.

    Attributes:
        gated: as given.
    """

    def __init__(self, sources: Sequence[Drafter], gated: GatedProposals | None = None) -> None:
        self.gated = gated
        self.sources: tuple[Drafter, ...] = (*(() if gated is None else (gated,)), *sources)
        self._shared = SharedLengths(len(self.sources))
        self._choices: dict[int, DraftChoice] = {}  # by slot

    def begin(self, slot: int) -> None:
        """A request takes this slot."""
        self._choices[slot] = DraftChoice(self._shared)
        for source in self.sources:
            source.begin(slot)

    def write(self, windows: Sequence[tuple[int, RequestText, int, int]]) -> list[str]:
        """Put a draft into each text.

        Args:
            windows: slot, text, tokens of it that are accepted, and tokens of the draft behind them, at least 1.

        Returns:
            The source of each draft.
        """
        if not windows:
            return []
        rows = [_draft_row(*window) for window in windows]
        proposals = [source.propose(rows) for source in self.sources]
        return [
            self._write_row(row, [_filled(offered[index], row) for offered in proposals])
            for index, row in enumerate(rows)
        ]

    def observe(self, window: SeenWindow) -> None:
        """Tell all sources what became of a window."""
        for source in self.sources:
            source.observe(window)

    def num_proposed(self, slot: int, text_end: int) -> int:
        """Tokens that gated blocks propose behind so many of a request; 0 where another source would be chosen."""
        if self.gated is None or not self._choices[slot].is_best(self.sources.index(self.gated)):
            return 0
        return self.gated.num_ready(slot, text_end)

    def _write_row(self, row: DraftRow, drafts: Sequence[Proposal | None]) -> str:
        source = self._choices[row.slot].choose(row.text.tokens(0, row.text_end), drafts)
        chosen = drafts[source]
        assert chosen is not None
        row.text.put_draft(row.text_end, chosen.tokens)
        return self.sources[source].name


def _draft_row(slot: int, text: RequestText, text_end: int, num_tokens: int) -> DraftRow:
    copies = copy_known(
        text.tokens(0, text_end), num_prompt=text.num_prompt, prediction=text.prediction, num_tokens=num_tokens
    )
    return DraftRow(slot, text, text_end, num_tokens, copies)


def _filled(proposal: Proposal | None, row: DraftRow) -> Proposal | None:
    """A proposal of the draft's length."""
    if proposal is None or len(proposal.tokens) >= row.num_tokens:
        return proposal
    tail = row.copies.tokens[len(proposal.tokens) :]
    return Proposal(np.concatenate([proposal.tokens, tail]), proposal.is_trusted)
