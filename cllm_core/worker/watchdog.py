"""Watchdog: notices a worker that hangs. It pings the worker, which answers between any two steps.

The worker sends with each answer how long its next step may take, and again before a step that may take longer. So a
hung worker is told from one with a long step without guessing here. Knows no sockets; lives in one event loop.
"""

import asyncio
from collections.abc import Callable

from cllm_core.worker.messages import Alive

_TICK_SECONDS = 0.2
# Without requests nobody waits for a hung worker, and one that was swapped out needs a while to answer.
_IDLE_PING_SECONDS = 1.0
_IDLE_DEADLINE_SECONDS = 5.0


class Watchdog:
    """Watches one worker from the time that it is ready.

    Args:
        ping: sends a Ping.
        is_idle: whether no request is with the worker.
    """

    def __init__(self, ping: Callable[[], None], is_idle: Callable[[], bool]) -> None:
        self._ping = ping
        self._is_idle = is_idle
        self._deadline: float | None = None  # None until the worker has sent one
        self._silence = 0.0  # seconds of our own running time without any message while an answer is due
        self._is_waiting = False

    def on_message(self, message: object) -> None:
        """Count any message of the worker as a sign of life."""
        self._silence = 0.0
        if isinstance(message, Alive):
            self._deadline = message.deadline
            self._is_waiting = self._is_waiting and not message.is_answer

    async def wait_hung(self) -> float:
        """Return when the worker has not answered within its deadline, which is returned, in seconds."""
        loop = asyncio.get_running_loop()
        pinged_at = loop.time()
        self._send_ping()
        while True:
            before = loop.time()
            await asyncio.sleep(_TICK_SECONDS)
            now = loop.time()
            if self._is_waiting:
                # The time that this process itself was held up is not the worker's fault.
                self._silence += min(now - before, 2 * _TICK_SECONDS)
                deadline = self._current_deadline()
                if deadline is not None and self._silence > deadline:
                    return deadline
            elif not self._is_idle() or now - pinged_at >= _IDLE_PING_SECONDS:
                pinged_at = now
                self._send_ping()

    def _send_ping(self) -> None:
        self._silence = 0.0
        self._is_waiting = True
        self._ping()

    def _current_deadline(self) -> float | None:
        if self._deadline is None:
            return None
        return max(self._deadline, _IDLE_DEADLINE_SECONDS) if self._is_idle() else self._deadline
