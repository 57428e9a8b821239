"""How long the event loop keeps what is due waiting: every stream waits as long."""

import asyncio
from collections.abc import Callable

_PERIOD_SECONDS = 0.1


async def watch_loop(observe: Callable[[float], None]) -> None:
    """Report, ten times a second, by how many seconds the loop was late; runs until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _PERIOD_SECONDS
        await asyncio.sleep(_PERIOD_SECONDS)
        observe(max(0.0, loop.time() - due))
