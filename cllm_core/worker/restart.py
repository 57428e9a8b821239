"""RestartPolicy: whether and when a lost worker is replaced. Knows neither processes nor sockets."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Departure:
    """How a worker was lost.

    Attributes:
        reason: one line for people.
        retry: whether another worker with the same settings may do better.
        ready_seconds: for how long it served; None where it never got that far.
    """

    reason: str
    retry: bool
    ready_seconds: float | None


class RestartPolicy:
    """Doubles the wait with every loss, until a worker stays healthy for a while.

    Args:
        first_delay: seconds before the first restart.
        max_delay: seconds that the wait grows to.
        healthy_seconds: a worker that served this long starts the count anew.
        max_failed_starts: give up after this many starts in a row that never got ready, or where a worker says that
            retrying is no use; None never gives up.
    """

    def __init__(
        self,
        *,
        first_delay: float = 0.5,
        max_delay: float = 30.0,
        healthy_seconds: float = 60.0,
        max_failed_starts: int | None = 5,
    ) -> None:
        self._first_delay = first_delay
        self._max_delay = max_delay
        self._healthy_seconds = healthy_seconds
        self._max_failed_starts = max_failed_starts
        self._next_delay = first_delay
        self._failed_starts = 0

    def delay_after(self, departure: Departure) -> float | None:
        """Seconds to wait before the next start; None gives up. Call it once for each loss."""
        self._count(departure)
        if self._max_failed_starts is not None and (
            not departure.retry or self._failed_starts >= self._max_failed_starts
        ):
            return None
        delay = self._next_delay
        self._next_delay = min(2 * delay, self._max_delay)
        return delay

    def _count(self, departure: Departure) -> None:
        if departure.ready_seconds is None:
            self._failed_starts += 1
            return
        self._failed_starts = 0
        if departure.ready_seconds >= self._healthy_seconds:
            self._next_delay = self._first_delay
