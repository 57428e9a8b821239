"""QueueLimits: how many requests may be alive, in all and of one user, and when a refused one should come back."""

import time
from collections import deque
from collections.abc import Callable

from cllm_core.errors import EngineBusy

_LONGEST_RETRY_SECONDS = 60.0
_NUM_REMEMBERED = 32


class FinishPace:
    """How fast requests end, by the last of them.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_NUM_REMEMBERED)

    def on_end(self) -> None:
        """Note that a request has ended."""
        self._ends.append(self._clock())

    @property
    def seconds_per_request(self) -> float | None:
        """Mean time between two ends, up to now; None before there were two."""
        if len(self._ends) < 2:
            return None
        return (self._clock() - self._ends[0]) / (len(self._ends) - 1)


class QueueLimits:
    """Refuses requests beyond the limits.

    Args:
        max_waiting: requests that may wait beyond those that run.
        max_user_share: part of all that one user may hold, waiting or running, 0..1.
        pace: of requests that end.
    """

    def __init__(self, *, max_waiting: int, max_user_share: float = 1.0, pace: FinishPace | None = None) -> None:
        self._max_waiting = max_waiting
        self._max_user_share = max_user_share
        self._pace = pace or FinishPace()
        self._num_refused = 0  # since one was taken

    def most(self, user: str, max_running: int) -> int:
        """Requests that a user may have at a time; nobody in particular ("") may have all.

        Args:
            user: as in NewRequest.
            max_running: requests that run together.
        """
        total = max_running + self._max_waiting
        return total if user == "" else max(1, int(self._max_user_share * total))

    def check(self, user: str, *, max_running: int, num_alive: int, num_of_user: int) -> None:
        """Raise EngineBusy unless one more request may come."""
        total, most = max_running + self._max_waiting, self.most(user, max_running)
        if num_alive >= total:
            raise self._busy(f"{total} requests are running or waiting already: try again later")
        if num_of_user >= most:
            raise self._busy(f"this user has {most} requests running or waiting already: try again later")
        self._num_refused = 0

    def on_end(self) -> None:
        """Note that a request has ended."""
        self._pace.on_end()

    def _busy(self, message: str) -> EngineBusy:
        """Each refused request is told to come when as many have ended as were refused before it, and one."""
        self._num_refused += 1
        seconds = self._pace.seconds_per_request
        wanted = 1.0 if seconds is None else seconds * self._num_refused
        return EngineBusy(message, retry_after=min(max(wanted, 1.0), _LONGEST_RETRY_SECONDS))
