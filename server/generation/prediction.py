"""How much of a predicted output came true: what usage reports of the `prediction` field.

    prediction   a b c d e f g h        output   a b c X e f g h
    accepted     a b c . e f g h        (7: two runs of equal tokens, in order)

Defined by the two texts alone, so it depends neither on how the engine drafted nor on how steps were cut.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

RUN_LENGTH = 3
"""Tokens that must agree before a run counts behind the place reached: shorter ones are mostly chance."""


class PredictedText:
    """The tokens of a prediction, searchable; the choices of a call share it."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = tuple(token_ids)
        self._starts: dict[tuple[int, ...], list[int]] = {}
        for start in range(len(self.token_ids) - RUN_LENGTH + 1):
            self._starts.setdefault(self.token_ids[start : start + RUN_LENGTH], []).append(start)

    def __len__(self) -> int:
        return len(self.token_ids)

    def find(self, run: tuple[int, ...], start: int) -> int | None:
        """First position >= start where these RUN_LENGTH tokens stand, None where they do not."""
        starts = self._starts.get(run, [])
        index = bisect_left(starts, start)
        return starts[index] if index < len(starts) else None


class PredictionAligner:
    """Counts the output tokens that were taken over from the prediction, greedily and in order.

    A place in the prediction is kept, at first its beginning. An output token equal to the one there is accepted and
    moves the place on. Otherwise the place jumps to where the last RUN_LENGTH output tokens stand next, if they do,
    and those of them are accepted that were not yet. Each output token and each predicted one counts at most once;
    the cost per output token does not depend on the length of either text, but for a binary search.
    """

    def __init__(self, predicted: PredictedText) -> None:
        self._predicted = predicted
        self._place = 0
        self._recent: deque[int] = deque(maxlen=RUN_LENGTH)
        self._num_unmatched = 0  # output tokens since the last accepted one
        self._num_accepted = 0

    @property
    def num_accepted(self) -> int:
        """Output tokens taken over from the prediction."""
        return self._num_accepted

    @property
    def num_rejected(self) -> int:
        """Predicted tokens that the output did not take over."""
        return len(self._predicted) - self._num_accepted

    def push(self, token_ids: Sequence[int]) -> None:
        """Take the next output tokens."""
        if not self._predicted:
            return
        for token_id in token_ids:
            self._recent.append(token_id)
            self._num_unmatched += 1
            self._match(token_id)

    def _match(self, token_id: int) -> None:
        ids = self._predicted.token_ids
        if self._place < len(ids) and ids[self._place] == token_id:
            self._accept(1, place=self._place + 1)
        elif (start := self._predicted.find(tuple(self._recent), self._place)) is not None:
            self._accept(min(self._num_unmatched, RUN_LENGTH), place=start + RUN_LENGTH)

    def _accept(self, num_tokens: int, *, place: int) -> None:
        self._num_accepted += num_tokens
        self._place = place
        self._num_unmatched = 0
