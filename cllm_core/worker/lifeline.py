"""How a worker learns from outside that it must go: its parent died, or a signal arrived."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from types import FrameType

EXIT_ORPHANED = 4


def leave_with_parent(clean_up: Callable[[], None]) -> None:
    """End this process at once when standard input closes, as it does with the death of the parent that holds it.

    An orphan must not keep a GPU, so nothing is waited for: not a step, not the loading. The pipe works on every
    system and, unlike prctl(PR_SET_PDEATHSIG), does not fire when the mere thread ends that started the worker.
    Standard input itself becomes empty, so that no library takes the pipe for a person who answers questions.
    """
    lifeline = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_watch, args=(lifeline, clean_up), name="lifeline", daemon=True).start()


def _watch(lifeline: int, clean_up: Callable[[], None]) -> None:
    try:
        while os.read(lifeline, 1024):
            pass
        clean_up()
    finally:
        os._exit(EXIT_ORPHANED)


class StopSignals:
    """Turns signals into a question and a file descriptor, so that a step is not torn and a blocking poll wakes up.

    Made in the main thread. Replaces the handlers of the signals for the rest of the process.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._requested = False
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, self._request)

    def requested(self) -> bool:
        """Whether one of the signals has come."""
        return self._requested

    def fileno(self) -> int:
        """Readable once one of the signals has come."""
        return self._reader.fileno()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
