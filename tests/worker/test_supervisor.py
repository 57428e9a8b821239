"""Worker processes of our own: life, death and what comes after."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
import uvloop

from cllm_core.config import EngineConfig
from cllm_core.errors import EngineUnavailable
from cllm_core.request import RequestOutput
from cllm_core.worker import transport
from cllm_core.worker.client import remote_worker, supervised_worker
from cllm_core.worker.process import EXIT_BAD_SETTINGS, EXIT_LEFT, EXIT_LOAD_FAILED
from cllm_core.worker.supervisor import RestartPolicy, WorkerProcess, describe_exit, worker_environment
from tests.worker.conftest import FAKE_ENGINE, ROOT, StartSupervised, happens, reaches
from tests.worker.fake_engine import BREAKS_DEVICE, KILLS_PROCESS, LONG_STEP, SLOW_STEPS, make_request

ENDLESS = 10**6

PARENT = """
import asyncio, sys
from cllm_core.config import EngineConfig
from cllm_core.worker.supervisor import RestartPolicy
from cllm_core.worker.client import supervised_worker

async def main():
    client = supervised_worker(EngineConfig(), worker_arguments=("--engine", sys.argv[1]))
    await client.start()
    while client.status.detail != sys.argv[2]:
        await asyncio.sleep(0.01)
    print("up", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


StartAlone = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartAlone]:
    """Factory of workers without a supervisor; killed after the test."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with contextlib.ExitStack() as stack:

        def start(endpoint: str, *, engine: str = FAKE_ENGINE, config: str = "{}") -> subprocess.Popen[bytes]:
            arguments = ["--endpoint", endpoint, "--engine", engine, "--config", config, "--log-format", "console"]
            command = [sys.executable, "-m", "cllm_core.worker", *arguments]
            worker = stack.enter_context(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE))
            stack.callback(worker.kill)
            return worker

        yield start


async def collect(stream: AsyncGenerator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


def pid_of(host: WorkerProcess) -> int:
    assert host.pid is not None
    return host.pid


async def test_a_killed_worker_costs_its_requests_an_error_and_is_replaced(start_supervised: StartSupervised) -> None:
    client, host = await start_supervised()
    await reaches(client, "ready")
    streams = [client.submit(make_request(str(i), prompt=(SLOW_STEPS,), max_tokens=ENDLESS)) for i in range(3)]
    for stream in streams:
        await anext(stream)  # else they would be run again
    os.kill(pid_of(host), signal.SIGKILL)
    killed_at = time.monotonic()
    for stream in streams:
        assert [output.finish_reason for output in await collect(stream) if output.finish_reason] == ["error"]
    assert time.monotonic() - killed_at < 1
    assert client.status.state == "restarting"
    with pytest.raises(EngineUnavailable, match="restarting"):
        client.submit(make_request())
    await reaches(client, "ready")
    assert client.status.num_restarts == 1
    assert len(await collect(client.submit(make_request()))) == 3


@pytest.mark.parametrize(
    ("poison", "reason"), [(BREAKS_DEVICE, "an internal error (RuntimeError"), (KILLS_PROCESS, "was lost")]
)
async def test_a_request_that_breaks_the_worker_ends_in_an_error(
    start_supervised: StartSupervised, poison: int, reason: str
) -> None:
    client, _ = await start_supervised()
    await reaches(client, "ready")
    (output,) = await collect(client.submit(make_request(prompt=(poison,))))
    assert output.finish_reason == "error"
    assert reason in (output.error or "")
    assert "device-side" not in (output.error or ""), "the text of an internal error is for the log"
    await reaches(client, "ready")
    assert len(await collect(client.submit(make_request()))) == 3


async def test_a_model_that_cannot_be_loaded_fails_for_good_with_the_reason(start_supervised: StartSupervised) -> None:
    client, _ = await start_supervised("tests.worker.fake_engine:build_missing_model")
    await reaches(client, "failed")
    assert "does not exist: check the name" in client.status.detail
    assert client.status.num_restarts == 0


async def test_a_worker_that_dies_before_it_is_ready_is_given_up(start_supervised: StartSupervised) -> None:
    client, _ = await start_supervised("tests.worker.fake_engine:build_out_of_memory", max_failed_starts=2)
    await reaches(client, "failed")
    assert "internal error (MemoryError" in client.status.detail
    assert client.status.num_restarts == 1


async def test_an_engine_that_cannot_be_imported_fails_with_the_remedy(start_supervised: StartSupervised) -> None:
    client, _ = await start_supervised("no_such_module:build")
    await reaches(client, "failed")
    assert "give module:function" in client.status.detail


async def test_loading_shows_in_the_status_and_can_be_stopped(start_supervised: StartSupervised) -> None:
    client, host = await start_supervised("tests.worker.fake_engine:build_for_ever")
    await happens(lambda: client.status.detail == "loading for ever")
    assert (client.status.state, client.status.progress) == ("starting", 0.25)
    pid = pid_of(host)
    await asyncio.wait_for(client.stop(), 5)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_loading_may_report_from_several_threads(start_supervised: StartSupervised) -> None:
    client, _ = await start_supervised("tests.worker.fake_engine:build_in_threads")
    await reaches(client, "ready")
    assert len(await collect(client.submit(make_request()))) == 3


async def test_stop_ends_streams_process_and_folder(
    start_supervised: StartSupervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="cllm-test-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        client, host = await start_supervised()
        await reaches(client, "ready")
        (private,) = os.listdir(folder)
        assert os.stat(os.path.join(folder, private)).st_mode & 0o777 == 0o700
        pid, stream = pid_of(host), client.submit(make_request(prompt=(SLOW_STEPS,), max_tokens=ENDLESS))
        await client.stop()
        assert [output.finish_reason for output in await collect(stream)] == ["abort"]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert os.listdir(folder) == []


async def test_a_worker_that_does_not_listen_is_killed_by_stop(start_supervised: StartSupervised) -> None:
    client, host = await start_supervised()
    await reaches(client, "ready")
    pid = pid_of(host)
    os.kill(pid, signal.SIGSTOP)
    await asyncio.wait_for(client.stop(), 10)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_ctrl_c_leaves_a_supervised_worker_to_its_parent(start_supervised: StartSupervised) -> None:
    client, host = await start_supervised()
    await reaches(client, "ready")
    stream = client.submit(make_request(prompt=(SLOW_STEPS,), max_tokens=10))
    await anext(stream)
    os.kill(pid_of(host), signal.SIGINT)
    assert (await collect(stream))[-1].finish_reason == "length"
    assert os.getsid(pid_of(host)) != os.getsid(0)


async def test_every_request_ends_exactly_once_while_workers_are_killed(start_supervised: StartSupervised) -> None:
    (client, host), rng = await start_supervised(), random.Random(7)

    async def use(request_id: str) -> None:
        prompt = (rng.choice([1, SLOW_STEPS]), *request_id.encode())  # no two alike: else they would be refused
        request = make_request(request_id, prompt=prompt, max_tokens=rng.randint(1, 40))
        outputs = await collect(client.submit(request))
        assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]

    for kill in range(4):
        await reaches(client, "ready")
        uses = [asyncio.create_task(use(f"{kill}-{i}")) for i in range(20)]
        await asyncio.sleep(rng.random() / 4)
        os.kill(pid_of(host), signal.SIGKILL)
        async with asyncio.timeout(30):  # those without output are run again by the next worker
            await asyncio.gather(*uses)
        await happens(lambda: client.status.num_restarts == kill + 1)  # noqa: B023


@pytest.mark.parametrize(("engine", "detail"), [("build", ""), ("build_for_ever", "loading for ever")])
def test_no_worker_outlives_a_killed_parent(engine: str, detail: str) -> None:
    """The worker holds the parent's stderr: it closes only when both are gone."""
    with tempfile.TemporaryDirectory(prefix="cllm-test-") as folder:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, f"tests.worker.fake_engine:{engine}", detail],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        parent.kill()
        parent.communicate(timeout=10)
        assert list(Path(folder).iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_started_alone_ends_requests_and_leaves_on_a_signal(
    start_alone: StartAlone, endpoint: str, number: int
) -> None:
    worker, client = start_alone(endpoint), remote_worker(endpoint, max_waiting=2)
    await client.start()
    await reaches(client, "ready")
    stream = client.submit(make_request(prompt=(SLOW_STEPS,), max_tokens=ENDLESS))
    await anext(stream)
    worker.send_signal(number)
    assert (await collect(stream))[-1].finish_reason == "abort"
    await asyncio.to_thread(worker.communicate, timeout=10)
    assert worker.returncode == EXIT_LEFT
    await client.stop()


async def test_a_signal_wakes_an_idle_worker(start_alone: StartAlone, endpoint: str) -> None:
    worker, client = start_alone(endpoint), remote_worker(endpoint, max_waiting=2)
    await client.start()
    await reaches(client, "ready")
    worker.send_signal(signal.SIGTERM)
    await asyncio.to_thread(worker.communicate, timeout=10)
    assert worker.returncode == EXIT_LEFT
    await client.stop()


@pytest.mark.parametrize(
    ("settings", "exit_code", "message"),
    [
        ({"engine": "tests.worker.fake_engine:build_missing_model"}, EXIT_LOAD_FAILED, "check the name"),
        ({"config": '{"max_num_seqs": 0}'}, EXIT_BAD_SETTINGS, "max_num_seqs=0"),
        ({"config": '{"colour": 1}'}, EXIT_BAD_SETTINGS, "colour"),
    ],
)
def test_a_worker_started_alone_says_on_stderr_why_it_leaves(
    start_alone: StartAlone, endpoint: str, settings: dict[str, str], exit_code: int, message: str
) -> None:
    worker = start_alone(endpoint, **settings)
    _, stderr = worker.communicate(timeout=20)
    assert worker.returncode == exit_code
    assert message in stderr.decode()


async def test_a_remote_worker_is_missed_when_silent_but_not_when_busy(
    monkeypatch: pytest.MonkeyPatch, start_alone: StartAlone, tcp_endpoint: str
) -> None:
    monkeypatch.setattr(transport, "HEARTBEAT_MS", 100)
    monkeypatch.setattr(transport, "HEARTBEAT_TIMEOUT_MS", 500)
    worker, client = start_alone(tcp_endpoint), remote_worker(tcp_endpoint, max_waiting=2)
    await client.start()
    await reaches(client, "ready")
    outputs = await collect(client.submit(make_request("busy", prompt=(LONG_STEP,), max_tokens=1)))
    assert [output.finish_reason for output in outputs] == ["length"]
    stream = client.submit(make_request("silent", prompt=(SLOW_STEPS,), max_tokens=ENDLESS))
    await anext(stream)  # else it would wait to be run again
    worker.send_signal(signal.SIGSTOP)
    assert (await collect(stream))[-1].finish_reason == "error"
    await reaches(client, "restarting", seconds=3)
    worker.kill()
    await asyncio.to_thread(worker.communicate)
    await client.stop()


async def test_a_process_that_the_system_refuses_to_start_is_a_failure_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, start_supervised: StartSupervised
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    client, _ = await start_supervised(max_failed_starts=2)
    await reaches(client, "failed")
    assert "/nowhere/python" in client.status.detail


async def test_a_temporary_folder_of_too_long_a_name_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start_supervised: StartSupervised
) -> None:
    long_folder = tmp_path / ("x" * 100)
    long_folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long_folder))
    client, _ = await start_supervised()
    await reaches(client, "failed")
    assert "TMPDIR" in client.status.detail


def test_the_event_loop_of_the_server_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn runs uvloop, which has its own subprocesses and sockets."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    async def live() -> None:
        policy = RestartPolicy(first_delay=0.01)
        client = supervised_worker(EngineConfig(), worker_arguments=("--engine", FAKE_ENGINE), policy=policy)
        await client.start()
        await reaches(client, "ready")
        (output,) = await collect(client.submit(make_request(prompt=(KILLS_PROCESS,))))
        assert output.finish_reason == "error"
        await happens(lambda: client.status.num_restarts == 2)  # it is run again once
        await reaches(client, "ready")
        outputs = await collect(client.submit(make_request(prompt=(0,))))
        assert [token_id for output in outputs for token_id in output.token_ids] == [1, 2, 3]
        await client.stop()

    uvloop.run(live())


async def test_a_closed_host_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    host = WorkerProcess(EngineConfig(), ("--engine", FAKE_ENGINE))
    await host.launch()
    await host.close()
    assert host.pid is None


@pytest.mark.parametrize("own", [{"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "active"}])
def test_how_threads_of_a_worker_wait_is_left_to_the_environment_where_it_says(own: dict[str, str]) -> None:
    assert worker_environment(own) == own
    assert worker_environment({"HOME": "/"}) == {"HOME": "/", "GOMP_SPINCOUNT": "20000"}


def test_exits_are_described_for_people() -> None:
    assert describe_exit(3) == "the worker process ended with exit code 3"
    assert describe_exit(-signal.SIGKILL) == "the worker process was killed by SIGKILL (out of memory?)"


async def test_a_restarted_worker_serves_the_adapters_that_were_loaded_and_not_those_unloaded(
    start_supervised: StartSupervised,
) -> None:
    client, host = await start_supervised()
    await reaches(client, "ready")
    for name in ("sql", "chat"):
        await client.load_adapter(name, f"adapters/{name}")
    await client.unload_adapter("chat")
    assert host.pid is not None
    os.kill(host.pid, signal.SIGKILL)
    await happens(lambda: client.status.num_restarts == 1 and client.status.state == "ready")
    assert [(adapter.name, adapter.path) for adapter in client.info.adapters] == [("sql", "adapters/sql")]


async def test_a_standby_takes_over_when_the_worker_is_lost_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    policy = RestartPolicy(first_delay=0.01)
    arguments = ("--engine", FAKE_ENGINE, "--log-level", "error")
    client = supervised_worker(EngineConfig(), worker_arguments=arguments, policy=policy, standby=True)
    await client.start()
    try:
        pids = []
        for _ in range(3):
            await reaches(client, "ready")
            await happens(lambda: len(children()) == 2)
            assert client.worker_pid is not None
            [standby] = children() - {client.worker_pid}
            pids.append((client.worker_pid, standby))
            os.kill(client.worker_pid, signal.SIGKILL)
            await happens(lambda: client.worker_pid != pids[-1][0])
        await reaches(client, "ready")
        assert [worker for worker, _ in pids[1:]] == [standby for _, standby in pids[:-1]]
    finally:
        await client.stop()
    assert children() == set()


async def test_a_standby_that_was_lost_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    host = WorkerProcess(EngineConfig(), ("--engine", FAKE_ENGINE), standby=True)
    await host.launch()
    host.prepare_next()
    await happens(lambda: len(children()) == 2)
    [standby] = children() - {host.pid}
    os.kill(standby, signal.SIGKILL)
    await happens(lambda: len(children()) == 1)
    await host.dismiss(None, is_hung=True)
    await host.launch()
    assert host.pid in children()
    await host.close()
    assert children() == set()


def children() -> set[int]:
    """Living worker processes of this one."""
    found = psutil.Process().children()
    return {child.pid for child in found if child.status() != psutil.STATUS_ZOMBIE}


async def test_the_stacks_of_a_hung_worker_reach_the_log(
    start_supervised: StartSupervised, capfd: pytest.CaptureFixture[str]
) -> None:
    client, _ = await start_supervised(step_timeout=0.5)
    await reaches(client, "ready")
    (output,) = await collect(client.submit(make_request(prompt=(LONG_STEP,))))
    assert output.finish_reason == "error"
    await happens(lambda: client.status.num_restarts >= 1)
    await reaches(client, "ready")
    written = capfd.readouterr().err
    assert "most recent call first" in written
    assert "fake_engine.py" in written
