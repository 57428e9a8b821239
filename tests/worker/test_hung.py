"""Workers that hang, and what becomes of requests when a worker is lost: real processes, stopped and killed."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator

import pytest

from cllm_core.errors import PromptCrashedWorker
from cllm_core.request import RequestOutput
from cllm_core.worker import watchdog
from cllm_core.worker.client import WorkerClient
from cllm_core.worker.crashes import CrashedPrompts
from cllm_core.worker.messages import Alive
from cllm_core.worker.supervisor import WorkerProcess
from cllm_core.worker.watchdog import Watchdog
from tests.worker.conftest import StartSupervised, happens, reaches
from tests.worker.fake_engine import HANGS, KILLS_PROCESS, LONG_STEP, SLOW_STEPS, make_request

ENDLESS = 10**6
DEADLINE = 1.0


async def collect(stream: AsyncGenerator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


def send_signal(process: WorkerProcess, number: int) -> int:
    assert process.pid is not None
    os.kill(process.pid, number)
    return process.pid


async def serves_again(client: WorkerClient, *, num_restarts: int = 1) -> None:
    await happens(lambda: client.status.num_restarts == num_restarts and client.status.state == "ready")
    assert len(await collect(client.submit(make_request("after")))) == 3


async def test_a_stopped_worker_ends_its_requests_and_is_replaced(start_supervised: StartSupervised) -> None:
    """It used to leave them waiting for ever, and the server ready."""
    client, process = await start_supervised(step_timeout=DEADLINE)
    await reaches(client, "ready")
    streams = [client.submit(make_request(str(i), prompt=(SLOW_STEPS,), max_tokens=ENDLESS)) for i in range(3)]
    for stream in streams:
        await anext(stream)
    pid, stopped_at = send_signal(process, signal.SIGSTOP), time.monotonic()
    for stream in streams:
        last = (await collect(stream))[-1]
        assert (last.finish_reason, "hung" in (last.error or "")) == ("error", True)
    assert time.monotonic() - stopped_at < 3 * DEADLINE
    await serves_again(client)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_step_that_never_ends_is_ended_and_its_prompt_refused(start_supervised: StartSupervised) -> None:
    client, _ = await start_supervised(step_timeout=0.3)
    await reaches(client, "ready")
    (output,) = await collect(client.submit(make_request(prompt=(HANGS,))))
    assert output.finish_reason == "error"
    await serves_again(client, num_restarts=2)
    with pytest.raises(PromptCrashedWorker, match="2 crashes"):
        client.submit(make_request(prompt=(HANGS,)))


async def test_an_idle_worker_that_is_stopped_is_replaced(
    monkeypatch: pytest.MonkeyPatch, start_supervised: StartSupervised
) -> None:
    monkeypatch.setattr(watchdog, "_IDLE_DEADLINE_SECONDS", DEADLINE)
    client, process = await start_supervised(step_timeout=DEADLINE)
    await reaches(client, "ready")
    send_signal(process, signal.SIGSTOP)
    await happens(lambda: client.status.state != "ready")
    await serves_again(client)


async def test_a_long_step_within_its_deadline_is_not_hung(start_supervised: StartSupervised) -> None:
    client, _ = await start_supervised(step_timeout=30)
    await reaches(client, "ready")
    outputs = await collect(client.submit(make_request(prompt=(LONG_STEP,), max_tokens=1)))
    assert (outputs[-1].finish_reason, client.status.num_restarts) == ("length", 0)


async def test_a_worker_without_a_deadline_is_never_hung() -> None:
    """As the first one it sends may be infinite: --step-timeout 0."""
    dog = Watchdog(lambda: None, lambda: False)
    dog.on_message(Alive(float("inf"), is_answer=False))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(dog.wait_hung(), 0.7)


async def test_time_in_which_the_event_loop_stood_still_is_not_held_against_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "_TICK_SECONDS", 0.02)
    dog = Watchdog(lambda: None, lambda: False)
    dog.on_message(Alive(0.3, is_answer=False))
    waiting = asyncio.create_task(dog.wait_hung())
    await asyncio.sleep(0.05)
    time.sleep(0.5)  # noqa: ASYNC251 (this is what is tested)
    await asyncio.sleep(0.03)
    assert not waiting.done()
    assert await asyncio.wait_for(waiting, 5) == 0.3


async def test_requests_without_output_are_run_again_after_a_crash(start_supervised: StartSupervised) -> None:
    client, process = await start_supervised(step_timeout=30)
    await reaches(client, "ready")
    send_signal(process, signal.SIGSTOP)
    streams = [client.submit(make_request(str(i), prompt=(i,))) for i in range(1, 4)]
    left = client.submit(make_request("left"))
    await left.aclose()
    send_signal(process, signal.SIGKILL)
    tokens = [[id for output in await collect(stream) for id in output.token_ids] for stream in streams]
    assert tokens == [[2, 3, 4], [3, 4, 5], [4, 5, 6]]
    assert (client.status.num_restarts, client.num_requests) == (1, 0)


async def test_a_prompt_that_was_running_in_two_crashes_is_refused(start_supervised: StartSupervised) -> None:
    client, _ = await start_supervised()
    await reaches(client, "ready")
    (output,) = await collect(client.submit(make_request(prompt=(KILLS_PROCESS,))))
    assert output.finish_reason == "error"
    await serves_again(client, num_restarts=2)
    with pytest.raises(PromptCrashedWorker):
        client.submit(make_request(prompt=(KILLS_PROCESS,)))
    assert client.num_requests == 0


def test_a_prompt_that_was_decoded_between_two_crashes_is_not_refused() -> None:
    crashed, innocent = CrashedPrompts(), make_request(prompt=(1,))
    crashed.record([innocent, make_request("twin", prompt=(1,))])
    crashed.clear(innocent)
    crashed.record([innocent])
    assert not crashed.is_refused(innocent)
    crashed.record([innocent])
    assert crashed.is_refused(innocent)


def test_the_memory_of_crashes_is_bounded() -> None:
    crashed = CrashedPrompts()
    for number in range(3000):
        crashed.record([make_request(prompt=(number,))])
    assert len(crashed) == 1024
