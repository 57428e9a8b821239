"""A server under load while everything goes wrong: no request is lost, no text is wrong, nothing is left behind."""

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.faults import ALL, SHORT, Fault, Target
from tests.chaos.load import Load, Outcomes
from tests.chaos.server import check_left, held, target, wait_idle

Seen = list[tuple[str, float, str]]
"""Name of a fault, seconds that it took, and what its own clients saw."""


async def go_wrong(
    target: Target, faults: Sequence[Fault], *, at_least: int, concurrency: int, num_prompts: int
) -> tuple[Outcomes, Seen]:
    """Let the faults happen one after the other, and all of it again until so many requests were sent."""
    url = target.served.url
    expected = await Load(url, num_prompts=num_prompts).learn()
    load = Load(url, concurrency=concurrency, num_prompts=num_prompts, expected=expected)
    running = asyncio.create_task(load.run(at_least=at_least))
    seen: Seen = []
    while not seen or load.outcomes.total < at_least:
        for fault in faults:
            began = time.monotonic()
            what = await fault(target)
            seen.append((fault.__name__, time.monotonic() - began, what))
            await asyncio.sleep(0.3)
    load.stop()
    await running
    return load.outcomes, seen


def report(outcomes: Outcomes, seen: Seen) -> str:
    """The table of a run."""
    lines = [f"| {name} | {seconds:.1f} | {what} |" for name, seconds, what in seen]
    counts = ", ".join(f"{count} {name}" for name, count in outcomes.counts.most_common())
    head = ["", "| fault | seconds | what its clients saw |", "| --- | --- | --- |"]
    return "\n".join([*head, *lines, f"{outcomes.total} requests: {counts}; longest {outcomes.longest:.1f} s"])


def let_loose(checkpoint: Path | str, folder: Path, base: Path, faults: Sequence[Fault], **load: int) -> None:
    """Run a server, let the faults happen, and check what is left."""
    with target(checkpoint, folder, base) as server:
        server.served.complete(max_tokens=4)
        before = held(server)
        outcomes, seen = asyncio.run(go_wrong(server, faults, **load))
        sys.stdout.write(report(outcomes, seen) + "\n")
        assert outcomes.problems == []
        assert outcomes.counts["answered"] > outcomes.total / 2
        wait_idle(server)
        check_left(before, server)
        # A stream that nobody ended would hold up the drain.
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=15)
        assert time.monotonic() - began < 10


def test_faults_under_load_lose_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    let_loose(tiny_llama, tmp_path, tiny_llama, SHORT, at_least=100, concurrency=4, num_prompts=2)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_among_all_faults(tiny_llama: Path, tmp_path: Path) -> None:
    let_loose(tiny_llama, tmp_path, tiny_llama, ALL, at_least=10_000, concurrency=16, num_prompts=60)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_the_embedded_model_among_all_faults(tmp_path: Path) -> None:
    from cllm_core.models.embedded import EMBEDDED_NAME, embedded_folder  # noqa: PLC0415

    base = embedded_folder(lambda stage, fraction: None)
    let_loose(EMBEDDED_NAME, tmp_path, base, ALL, at_least=400, concurrency=4, num_prompts=6)
