"""Drafting: writes the drafts of a step, each by the source that its request's choice names."""

from collections.abc import Sequence

import numpy as np

from cllm_core.engine.drafters.base import Drafter, DraftRow, Proposal, SeenWindow
from cllm_core.engine.drafters.choice import DraftChoice, SharedLengths
from cllm_core.engine.drafters.copying import copy_known
from cllm_core.engine.drafters.gated import GatedProposals
from cllm_core.engine.request_text import RequestText


class Drafting:
    """Drafts of running requests.

    Args:
        sources: in the order in which they are preferred where nothing tells them apart.
        gated: the source that gated blocks feed, preferred to these; None: there is none.

    Attributes:
        gated: as given.
        shared: what the sources were worth to all requests so far.
    """

    def __init__(self, sources: Sequence[Drafter], gated: GatedProposals | None = None) -> None:
        self.gated = gated
        self.sources: tuple[Drafter, ...] = (*(() if gated is None else (gated,)), *sources)
        self.shared = SharedLengths(len(self.sources))
        self._choices: dict[int, DraftChoice] = {}  # by slot

    def begin(self, slot: int, text: RequestText) -> None:
        """A request takes this slot."""
        self._choices[slot] = DraftChoice(self.shared)
        for source in self.sources:
            source.begin(slot, text)

    def end(self, slot: int) -> None:
        """The request of this slot left it."""
        for source in self.sources:
            source.end(slot)

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
        proposals = [self._propose(source, rows) for source in self.sources]
        return [
            self._write_row(row, [_filled(offered[index], row) for offered in proposals])
            for index, row in enumerate(rows)
        ]

    def observe(self, window: SeenWindow) -> None:
        """Write down what a window predicted, and tell all sources what became of it."""
        window.text.write_draft(window.text_end, window.predicted_ids)
        for source in self.sources:
            source.observe(window)

    def num_proposed(self, slot: int, text_end: int) -> int:
        """Tokens that gated blocks propose behind so many of a request; 0 where another source would be chosen."""
        if self.gated is None or not self._choices[slot].is_best(self.sources.index(self.gated)):
            return 0
        return self.gated.num_ready(slot, text_end)

    def _propose(self, source: Drafter, rows: Sequence[DraftRow]) -> Sequence[Proposal | None]:
        """Of one source, for the rows whose requests take it."""
        taking = [row for row in rows if _takes(row.text, source)]
        if len(taking) == len(rows):
            return source.propose(rows)
        found = iter(source.propose(taking) if taking else ())
        return [next(found) if _takes(row.text, source) else None for row in rows]

    def _write_row(self, row: DraftRow, drafts: Sequence[Proposal | None]) -> str:
        if not any(drafts):  # no source knows anything: what fills up drafts has to do
            drafts = [Proposal(row.copies.tokens) if _takes(row.text, source) else None for source in self.sources]
        source = self._choices[row.slot].choose(row.text.tokens(0, row.text_end), drafts)
        chosen = drafts[source]
        assert chosen is not None
        row.text.put_draft(row.text_end, chosen.tokens)
        return self.sources[source].name


def _takes(text: RequestText, source: Drafter) -> bool:
    """Whether a request leaves the source in; gated blocks are planned only for requests that want them."""
    names = text.admission.request.params.drafters
    return names is None or source.name in names or source.name == GatedProposals.name


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
    return Proposal(np.concatenate([proposal.tokens, tail]), proposal.is_trusted, proposal.kind)
