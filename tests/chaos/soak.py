"""`make soak`: a server under load for half an hour; memory, descriptors and threads at minute 5 and at the end.

    python -m tests.chaos.soak [--minutes 30]

The load is that of the chaos tests, checked answer by answer, with clients that vanish and adapters that come and go.
Exit code 1 where memory grew by more than 2 %, or descriptors or threads grew.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.faults import Target, adapter_churn, broken_bodies, vanishing_clients
from tests.chaos.load import Load
from tests.chaos.server import target, wait_idle
from tests.checkpoints import write_checkpoint

MOST_GROWTH = 0.02
CONCURRENCY = 8
SETTLED_MINUTES = 5.0


@dataclass(frozen=True)
class Figures:
    """What all processes of a server hold together, when nothing runs."""

    minute: float
    requests: int
    mebibytes: float
    descriptors: int
    threads: int

    def __str__(self) -> str:
        return f"| {self.minute:.1f} | {self.requests} | {self.mebibytes:.1f} | {self.descriptors} | {self.threads} |"


def read_figures(server: Target, minute: float, num_requests: int) -> Figures:
    """The figures now; memory is what each process has for itself (USS)."""
    wait_idle(server)
    processes = [server.process, *server.processes]
    memory = sum(process.memory_full_info().uss for process in processes)
    descriptors = sum(process.num_fds() for process in processes)
    return Figures(minute, num_requests, memory / 2**20, descriptors, sum(p.num_threads() for p in processes))


async def load_for(server: Target, minutes: float, expected: list[list[str]]) -> int:
    """Keep the server busy for so long; returns how many requests were sent, each of them answered right."""
    load = Load(server.served.url, concurrency=CONCURRENCY, expected=expected)
    running = asyncio.create_task(load.run(at_least=1))
    ends = time.monotonic() + 60 * minutes
    while time.monotonic() < ends:
        for disturb in (vanishing_clients, adapter_churn, broken_bodies):
            await disturb(server)
        await asyncio.sleep(min(5.0, max(0.0, ends - time.monotonic())))
    load.stop()
    await running
    assert load.outcomes.problems == [], load.outcomes.problems[:3]
    return load.outcomes.total


def soak(server: Target, minutes: float) -> list[Figures]:
    """Figures at minute 5, every few minutes, and at the end."""
    expected = asyncio.run(Load(server.served.url).learn())
    began, num_requests, rows = time.monotonic(), 0, []
    for part in (SETTLED_MINUTES, *[(minutes - SETTLED_MINUTES) / 5] * 5):
        num_requests += asyncio.run(load_for(server, part, expected))
        rows.append(read_figures(server, (time.monotonic() - began) / 60, num_requests))
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    return rows


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_checkpoint(folder / "llama", "llama")
        sys.stdout.write("| minute | requests | MiB | descriptors | threads |\n| --- | --- | --- | --- | --- |\n")
        with target(base, folder, base) as server:
            first, *_, last = soak(server, options.minutes)
    growth = last.mebibytes / first.mebibytes - 1
    sys.stdout.write(f"memory grew by {growth:.2%} from minute {first.minute:.0f} to the end\n")
    return int(growth > MOST_GROWTH or last.descriptors > first.descriptors + 4 or last.threads > first.threads + 4)


if __name__ == "__main__":
    sys.exit(main())
