"""The server that chaos is let loose on: limits that bite soon, a clock that can be moved, a store on the disk."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.faults import Target
from tests.checkpoints import write_adapter
from tests.server.harness import wait_until
from tests.server.serve_process import serving

OPTIONS = (
    "--step-timeout=3",
    "--send-timeout=1.5",
    "--header-timeout=2",
    "--body-timeout=2",
    "--max-body-bytes=1000000",
)

# Loaded by Python before anything else: moves the wall clock as a file says, which the tests write.
SITE = """
import os, time

path, real = os.environ["CHAOS_CLOCK"], time.time

def moved():
    try:
        with open(path) as file:
            return real() + float(file.read() or 0)
    except (OSError, ValueError):
        return real()

time.time = moved
time.time_ns = lambda: int(moved() * 1e9)
"""

# Pools of threads grow to their bounds, and connections of a client that has just left close a moment later.
THREADS_OF_POOLS, DESCRIPTORS_OF_POOLS = 12, 12


@dataclass(frozen=True)
class Held:
    """What a server's processes hold."""

    threads: int
    descriptors: int
    worker_descriptors: int


@contextmanager
def target(checkpoint: Path | str, folder: Path, base: Path) -> Iterator[Target]:
    """A server of a checkpoint, with adapters made for `base`, which is its folder."""
    site, clock = folder / "site", folder / "clock"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    clock.write_text("0")
    sql = write_adapter(folder / "adapters" / "sql", base)
    write_adapter(folder / "adapters" / "chat", base, seed=2)
    options = [*OPTIONS, f"--adapter=sql={sql}", f"--adapter-root={folder / 'adapters'}"]
    options.append(f"--response-store={folder / 'store.sqlite'}")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    around = {"PYTHONPATH": path, "CHAOS_CLOCK": str(clock)}
    with serving(checkpoint, folder / "log", *options, environment=around) as served:
        yield Target(served, clock)


def held(target: Target) -> Held:
    """What the server's processes hold now."""
    server, worker = target.process, target.processes[0]
    return Held(server.num_threads(), server.num_fds(), worker.num_fds())


def wait_idle(target: Target) -> None:
    """Wait until nothing of any request is left in the engine."""
    served = target.served
    served.wait_ready()
    wait_until(lambda: served.metric("cllm_requests_running") + served.metric("cllm_requests_waiting") == 0, seconds=30)
    served.complete(max_tokens=1)
    assert served.metric("cllm_cache_blocks_used") == 0


def check_left(before: Held, target: Target) -> None:
    """Raise AssertionError where threads or descriptors have been left behind."""
    deadline = time.monotonic() + 20
    while True:
        now = held(target)
        try:
            assert now.threads <= before.threads + THREADS_OF_POOLS
            assert now.descriptors <= before.descriptors + DESCRIPTORS_OF_POOLS
            assert now.worker_descriptors <= before.worker_descriptors + DESCRIPTORS_OF_POOLS
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return


def memory(process: psutil.Process) -> int:
    """A process's own share of memory, in bytes."""
    return int(process.memory_full_info().uss)
