"""KnownText: the source that copies what followed the last tokens before (prompt look-up decoding)."""

from collections.abc import Sequence

from cllm_core.engine.drafters.base import DraftRow, Proposal, SeenWindow
from cllm_core.engine.request_text import RequestText


class KnownText:
    """Drafter that proposes what `copying` found in prompt, output and the client's prediction."""

    name = "copy"
    num_bytes = 0

    def begin(self, slot: int, text: RequestText) -> None:
        """See Drafter."""

    def end(self, slot: int) -> None:
        """See Drafter."""

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        """See Drafter."""
        copies = [row.copies for row in rows]
        return [Proposal(found.tokens, found.is_trusted) if found.is_found else None for found in copies]

    def observe(self, window: SeenWindow) -> None:
        """See Drafter."""
