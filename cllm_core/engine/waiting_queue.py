"""WaitingQueue: the order in which waiting requests are admitted. Users take turns; within one it is first come, first
served, so a server with a single user is a plain queue.

Turns are those of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): every request gets a start tag when it
arrives, one over its weight behind that of its user's request before, and never before the tag that was admitted last.
A hundred requests of one user thus stand behind the first of another who comes later, and no user starves.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from cllm_core.engine.request_state import RequestState

_PREEMPTED, _NEW = 0, 1
_MANY_USERS = 1024


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    """Sorted by these, in this order; the number makes it unique."""

    kind: int
    priority: int
    start: float
    number: int


class WaitingQueue:
    """The requests that wait for a slot, in the order of their admission.

    Preempted requests stand in front, the last one first. Then lower `priority` goes before higher.
    """

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._states: dict[_Place, RequestState] = {}
        self._place_of: dict[RequestState, _Place] = {}
        self._next_start: dict[str, float] = {}  # of the user's next request
        self._now = 0.0  # start tag admitted last
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[RequestState]:
        return (self._states[place] for place in self._places)

    @property
    def first(self) -> RequestState:
        """The request to admit next; IndexError where none waits."""
        return self._states[self._places[0]]

    def add(self, state: RequestState) -> None:
        """Queue a new request."""
        request = state.request
        if not self._places:  # nobody is owed a turn
            self._next_start.clear()
        start = max(self._now, self._next_start.get(request.user, 0.0))
        self._next_start[request.user] = start + 1 / request.weight
        if len(self._next_start) > _MANY_USERS:
            self._forget_idle_users()
        self._num_added += 1
        self._insert(state, _Place(_NEW, request.priority, start, self._num_added))

    def add_first(self, state: RequestState) -> None:
        """Put a preempted request in front of all."""
        self._num_added += 1
        self._insert(state, _Place(_PREEMPTED, 0, 0.0, -self._num_added))

    def pop(self) -> RequestState:
        """Take the request to admit next out of the queue; IndexError where none waits."""
        state = self.first
        self._now = max(self._now, self._places[0].start)
        self.remove(state)
        return state

    def remove(self, state: RequestState) -> None:
        """Take a request out that waits; KeyError for one that does not."""
        place = self._place_of.pop(state)
        del self._states[place]
        del self._places[bisect.bisect_left(self._places, place)]

    def _insert(self, state: RequestState, place: _Place) -> None:
        bisect.insort(self._places, place)
        self._states[place] = state
        self._place_of[state] = place

    def _forget_idle_users(self) -> None:
        """Those whose turn is due are like new ones; of the others, those who came first, where they are too many."""
        owed = [(user, start) for user, start in self._next_start.items() if start > self._now]
        self._next_start = dict(owed[-_MANY_USERS // 2 :])
