"""OwnPredictions: Jacobi's own source, what the model predicted behind the accepted text but did not confirm.

A CLLM was trained to be right there; a plain model predicted it from a wrong token and seldom is.
"""

from collections.abc import Sequence

from cllm_core.engine.drafters.base import DraftRow, Proposal, SeenWindow
from cllm_core.engine.request_text import RequestText


class OwnPredictions:
    """Drafter that shifts: predictions lie where they belong, so proposing them is reading on (see `jacobi`)."""

    name = "own"
    num_bytes = 0

    def begin(self, slot: int, text: RequestText) -> None:
        """See Drafter."""

    def end(self, slot: int) -> None:
        """See Drafter."""

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        """See Drafter; also where nothing is predicted yet, as what fills a draft is as good as any."""
        return [Proposal(row.text.predicted(row.text_end, row.num_tokens).copy()) for row in rows]

    def observe(self, window: SeenWindow) -> None:
        """See Drafter."""
