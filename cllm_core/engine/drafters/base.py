"""Drafter: a source of drafts. It proposes for all rows of a step at once and sees what became of each window."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cllm_core.engine.drafters.copying import Copies
from cllm_core.engine.ids import Ids
from cllm_core.engine.plan import GatedBlocks
from cllm_core.engine.request_text import RequestText


@dataclass(frozen=True, slots=True)
class DraftRow:
    """A window whose draft is wanted.

    Attributes:
        slot: of the request.
        text: of the request.
        text_end: tokens of it that are accepted.
        num_tokens: K, to propose behind them; at least 1.
        copies: K tokens that known text says to follow, or stand-ins: they fill up what a source proposes.
    """

    slot: int
    text: RequestText
    text_end: int
    num_tokens: int
    copies: Copies


@dataclass(frozen=True, slots=True)
class SeenWindow:
    """What the model made of a window.

    Attributes:
        slot: of the request.
        text: of the request.
        text_end: tokens of it that were accepted before.
        predicted_ids: n tokens from position text_end on: what follows each token of the window.
        num_accepted: 1..n leading predictions that are final.
        gated: its gated blocks, None where it had none.
        gated_ids: what these propose, one block after another.
    """

    slot: int
    text: RequestText
    text_end: int
    predicted_ids: Sequence[int]
    num_accepted: int
    gated: GatedBlocks | None = None
    gated_ids: Sequence[int] = ()


NUM_KINDS = 8
"""Kinds of proposals that a source may have."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a source proposes.

    Attributes:
        tokens: up to K.
        is_trusted: to be taken whatever the source was worth lately.
        kind: 0..NUM_KINDS - 1; what a source is worth is told apart by it, as it may know how well its proposals are
            founded.
    """

    tokens: Ids
    is_trusted: bool = False
    kind: int = 0


class Drafter(Protocol):
    """A source of drafts.

    Attributes:
        name: of the source, as users write it.
    """

    name: str

    @property
    def num_bytes(self) -> int:
        """Memory that it holds, or may grow to, beyond the model and the texts."""
        ...

    def begin(self, slot: int, text: RequestText) -> None:
        """A request takes this slot, for the first time or again after a preemption: forget the one before."""
        ...

    def end(self, slot: int) -> None:
        """The request of this slot left it; the next one may be long in coming."""
        ...

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        """A proposal for each row, None where there is nothing to go by."""
        ...

    def observe(self, window: SeenWindow) -> None:
        """Learn from a window; its text holds what it predicted already, behind its text_end."""
        ...
