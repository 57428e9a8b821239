"""Seconds until a server is ready again after its worker was killed, with and without a worker that stands by.

    python -m benchmarks.restart [MODEL] [--rounds 3]

Two servers are started one after the other; each has its worker killed so many times, with a pause in between for the
next standby's imports. Processor time is the new worker's own, without the imports of a standby, which are done before.
Memory is each process's share of what it has resident (PSS).
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil

STANDBY_SECONDS = 60.0  # that its imports may take


@contextmanager
def served(model: str | None, *flags: str) -> Iterator[tuple[psutil.Process, str]]:
    """A server of its own, and its URL."""
    code = "from server.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", *([model] if model else []), "--port", "8129", *flags]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield psutil.Process(process.pid), "http://127.0.0.1:8129"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def is_ready(url: str) -> bool:
    """Whether requests are taken."""
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False


def seconds_to_ready(url: str) -> float:
    """Time until requests are taken."""
    started = time.perf_counter()
    while not is_ready(url):
        time.sleep(0.01)
    return time.perf_counter() - started


def workers(server: psutil.Process) -> list[psutil.Process]:
    """The worker's process and, behind it, the standby's, which is always started later."""
    return sorted(server.children(), key=psutil.Process.create_time)


def busy_seconds(process: psutil.Process) -> float:
    """Processor time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def wait_for_standby(server: psutil.Process) -> float:
    """Processor time that its imports took, once it takes none any more."""
    deadline, before = time.monotonic() + STANDBY_SECONDS, -1.0
    while time.monotonic() < deadline:
        time.sleep(2.0)
        both = workers(server)
        now = busy_seconds(both[1]) if len(both) == 2 else 0.0
        if len(both) == 2 and now == before:
            return now
        before = now
    raise SystemExit("the standby did not come to rest")


def measure(model: str | None, rounds: int, *, standby: bool) -> None:
    """Print the figures of one server."""
    flag = "--standby-worker" if standby else "--no-standby-worker"
    walls, busies = [], []
    with served(model, flag) as (server, url):
        first = seconds_to_ready(url)
        for _ in range(rounds):
            imports = wait_for_standby(server) if standby else 0.0
            memory = [process.memory_full_info().pss // 2**20 for process in workers(server)]
            os.kill(workers(server)[0].pid, signal.SIGKILL)
            started = time.perf_counter()
            while is_ready(url):
                time.sleep(0.005)
            seconds_to_ready(url)
            walls.append(time.perf_counter() - started)
            busies.append(busy_seconds(workers(server)[0]) - imports)
    print(
        f"{'with' if standby else 'without'} standby: first start {first:.1f} s; back after "
        f"{statistics.median(walls):.2f} s (median of {', '.join(f'{wall:.2f}' for wall in walls)}), "
        f"{statistics.median(busies):.2f} s of processor time; worker {memory[0]} MiB"
        + (f", standby {memory[1]} MiB" if standby else "")
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for standby in (False, True):
        measure(options.model, options.rounds, standby=standby)


if __name__ == "__main__":
    main()
