"""WorkerClient against a worker in a thread, reached as a remote one."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec
import pytest

from cllm_core.errors import ConfigError, EngineBusy, EngineUnavailable, InvalidRequest
from cllm_core.request import NewRequest, RequestOutput
from cllm_core.worker.client import RequestTimeouts, WorkerClient, remote_worker
from cllm_core.worker.messages import Ready, StepReport
from cllm_core.worker.transport import WorkerSocket
from tests.worker.conftest import ThreadWorker, happens, reaches
from tests.worker.fake_engine import BAD_ADAPTER, BROKEN_ADAPTER, PREPARED, REFUSED, SLOW_STEPS, make_info, make_request

ENDLESS = 10**6


def endless(request_id: str = "r") -> NewRequest:
    return make_request(request_id, prompt=(SLOW_STEPS, 1), max_tokens=ENDLESS)


async def collect(stream: AsyncGenerator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


async def test_a_request_streams_its_tokens_and_ends_once(client: WorkerClient) -> None:
    outputs = await collect(client.submit(make_request(prompt=(1, 2, 3), max_tokens=3)))
    assert [output.token_ids for output in outputs] == [(4,), (5,), (6,)]
    assert [output.finish_reason for output in outputs] == [None, None, "length"]


async def test_the_client_knows_the_model(client: WorkerClient, worker: ThreadWorker) -> None:
    assert client.info == worker.engine.info


async def test_a_request_the_model_cannot_take_ends_in_an_error(client: WorkerClient) -> None:
    bad, good = client.submit(make_request("bad", prompt=(REFUSED,))), client.submit(make_request("good"))
    with pytest.raises(InvalidRequest, match=r"valid ids are 0\.\.899"):
        await collect(bad)
    assert (await collect(good))[-1].finish_reason == "length"


async def test_closing_a_stream_aborts_its_request_exactly_once(client: WorkerClient, worker: ThreadWorker) -> None:
    stream = client.submit(endless())
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    await client.drain(5)
    assert worker.engine.aborted == ["r"]


async def test_closing_an_unread_stream_aborts_its_request(client: WorkerClient, worker: ThreadWorker) -> None:
    await client.submit(endless()).aclose()
    await client.drain(5)
    assert worker.engine.aborted == ["r"]


async def test_cancelling_the_reader_aborts_its_request(client: WorkerClient, worker: ThreadWorker) -> None:
    reader = asyncio.create_task(collect(client.submit(endless())))
    await happens(lambda: client.stats.num_running == 1)
    reader.cancel()
    await client.drain(5)
    assert reader.cancelled()
    assert worker.engine.aborted == ["r"]


async def test_more_requests_than_may_run_and_wait_are_refused_as_busy(client: WorkerClient) -> None:
    streams = [client.submit(endless(str(i))) for i in range(4)]  # 2 running and 2 waiting
    with pytest.raises(EngineBusy, match="4 requests"):
        client.submit(make_request())
    await streams[0].aclose()
    await happens(lambda: client.stats.num_running == 3)
    assert len(await collect(client.submit(make_request()))) == 3


async def test_a_running_id_is_refused(client: WorkerClient) -> None:
    first = client.submit(make_request("twin"))
    with pytest.raises(InvalidRequest, match="'twin'"):
        client.submit(make_request("twin"))
    assert len(await collect(first)) == 3


async def test_a_slow_reader_delays_nobody_and_loses_nothing(client: WorkerClient) -> None:
    slow = client.submit(make_request("slow", max_tokens=500))
    assert len(await collect(client.submit(make_request("quick", max_tokens=600)))) == 600
    assert len(await collect(slow)) == 500


async def test_each_step_reaches_the_listeners_though_one_of_them_fails(client: WorkerClient) -> None:
    def broken(report: StepReport) -> None:
        raise ValueError("a metric of the wrong name")

    steps: list[int] = []
    client.add_step_listener(broken)
    client.add_step_listener(lambda report: steps.extend(step.num_steps for step in report.steps))
    await collect(client.submit(make_request(max_tokens=5)))
    assert steps == [1, 2, 3, 4, 5]


async def test_drain_lets_requests_end_and_refuses_new_ones(client: WorkerClient) -> None:
    stream = client.submit(make_request(prompt=(SLOW_STEPS,), max_tokens=5))
    draining = asyncio.create_task(client.drain(10))
    await asyncio.sleep(0)
    with pytest.raises(EngineUnavailable, match="draining"):
        client.submit(make_request("late"))
    await draining
    assert (await collect(stream))[-1].finish_reason == "length"


async def test_drain_ends_with_abort_what_outlives_the_grace(client: WorkerClient, worker: ThreadWorker) -> None:
    reader = asyncio.create_task(collect(client.submit(endless())))
    await client.drain(0.1)
    outputs = await reader
    assert [output.finish_reason for output in outputs if output.finish_reason] == ["abort"]
    await happens(lambda: worker.engine.aborted == ["r"])


async def test_stop_ends_streams_and_leaves_a_remote_worker_to_others(
    client: WorkerClient, worker: ThreadWorker
) -> None:
    reader = asyncio.create_task(collect(client.submit(endless())))
    await happens(lambda: client.stats.num_running == 1)
    await client.stop()
    assert (await reader)[-1].finish_reason == "abort"
    assert client.status.state == "stopped"
    successor = remote_worker(worker.endpoint, max_waiting=2)
    await successor.start()
    await reaches(successor, "ready")
    await successor.stop()
    await happens(lambda: worker.engine.aborted == ["r"])


async def test_a_client_may_come_before_its_worker_and_finds_the_next_one(endpoint: str) -> None:
    client = remote_worker(endpoint, max_waiting=2)
    await client.start()
    with pytest.raises(EngineUnavailable, match=endpoint):
        client.submit(make_request())
    with pytest.raises(EngineUnavailable):
        _ = client.info
    for _ in range(2):
        worker = ThreadWorker(endpoint)
        await reaches(client, "ready")
        assert len(await collect(client.submit(make_request()))) == 3
        await asyncio.to_thread(worker.stop)
        await reaches(client, "restarting")
    assert client.info == worker.engine.info
    await client.stop()


async def test_a_client_that_was_never_started_can_be_stopped(endpoint: str) -> None:
    client = remote_worker(endpoint, max_waiting=2)
    await client.stop()
    assert client.status.state == "stopped"


def test_a_malformed_endpoint_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        remote_worker("127.0.0.1:5557", max_waiting=2)


async def test_an_idle_worker_and_its_client_use_no_processor_time(client: WorkerClient) -> None:
    await collect(client.submit(make_request()))
    used = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - used < 0.1


@pytest.mark.parametrize("seed", range(5))
async def test_every_request_ends_exactly_once_under_random_use(
    client: WorkerClient, worker: ThreadWorker, seed: int
) -> None:
    rng = random.Random(seed)
    left: set[str] = set()

    async def use(request_id: str) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        stream = client.submit(make_request(request_id, max_tokens=rng.randint(1, 30)))
        leave_after = rng.choice([0, 1, 5, ENDLESS])
        while len(outputs) < leave_after and (output := await anext(stream, None)) is not None:
            outputs.append(output)
        if not outputs or outputs[-1].finish_reason is None:
            left.add(request_id)
        await stream.aclose()
        return outputs

    for round_number in range(25):
        ids = [f"{round_number}-{i}" for i in range(rng.randint(1, 4))]
        for request_id, outputs in zip(ids, await asyncio.gather(*map(use, ids)), strict=True):
            num_ends = sum(output.finish_reason is not None for output in outputs)
            assert num_ends == (0 if request_id in left else 1)
        await happens(lambda: client.num_requests == 0)
    assert set(worker.engine.aborted) <= left
    assert len(worker.engine.aborted) == len(set(worker.engine.aborted))
    assert not worker.engine.has_work()


def adapter_names(client: WorkerClient) -> list[str]:
    return [adapter.name for adapter in client.info.adapters]


async def test_a_loaded_adapter_is_told_to_every_client(client: WorkerClient, worker: ThreadWorker) -> None:
    other = remote_worker(worker.endpoint, max_waiting=2)
    await other.start()
    await reaches(other, "ready")
    await client.load_adapter("sql", "adapters/sql")
    assert adapter_names(client) == ["sql"]
    await happens(lambda: adapter_names(other) == ["sql"])
    await client.unload_adapter("sql")
    assert adapter_names(client) == []
    await other.stop()


@pytest.mark.parametrize(("path", "reason"), [(BAD_ADAPTER, "does not fit fake"), (BROKEN_ADAPTER, "OSError")])
async def test_an_adapter_that_cannot_be_loaded_harms_nobody(client: WorkerClient, path: str, reason: str) -> None:
    stream = client.submit(endless())
    await anext(stream)
    with pytest.raises(InvalidRequest, match=reason):
        await client.load_adapter("sql", path)
    assert (await anext(stream)).finish_reason is None
    assert adapter_names(client) == []
    await stream.aclose()


async def test_unloading_what_is_not_loaded_is_refused(client: WorkerClient) -> None:
    with pytest.raises(InvalidRequest, match="not loaded"):
        await client.unload_adapter("sql")


async def test_adapters_cannot_be_changed_without_a_worker(endpoint: str) -> None:
    client = remote_worker(endpoint, max_waiting=2)
    with pytest.raises(EngineUnavailable):
        await client.load_adapter("sql", "adapters/sql")


async def test_a_request_that_cannot_be_encoded_costs_itself_alone(client: WorkerClient) -> None:
    """Its stream used to stay registered, and with it a slot of the queue."""
    bad = msgspec.structs.replace(make_request("bad"), cache_salt="\ud800")
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        client.submit(bad)
    assert client.num_requests == 0
    assert len(await collect(client.submit(make_request("bad")))) == 3


@pytest.fixture
async def impatient_client(worker: ThreadWorker) -> AsyncIterator[WorkerClient]:
    timeouts = RequestTimeouts(first_token=0.2, whole=0.6)
    client = remote_worker(worker.endpoint, max_waiting=2, timeouts=timeouts)
    await client.start()
    await reaches(client, "ready")
    yield client
    await client.stop()


@pytest.mark.parametrize(
    ("prompt", "code", "num_tokens"), [(PREPARED, "ttft_timeout", 0), (SLOW_STEPS, "request_timeout", 1)]
)
async def test_a_request_that_takes_too_long_ends_in_an_error_and_frees_its_slot(
    impatient_client: WorkerClient, worker: ThreadWorker, prompt: int, code: str, num_tokens: int
) -> None:
    outputs = await collect(impatient_client.submit(make_request(prompt=(prompt,), max_tokens=ENDLESS)))
    assert [output.error_code for output in outputs if output.finish_reason] == [code]
    assert sum(len(output.token_ids) for output in outputs) >= num_tokens
    await happens(lambda: impatient_client.num_requests == 0)
    assert not worker.engine.has_work()


async def test_a_request_within_its_time_is_left_alone(impatient_client: WorkerClient) -> None:
    outputs = await collect(impatient_client.submit(make_request()))
    await asyncio.sleep(0.7)
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("unreadable", [{"type": "StepReport", "outputs": [{"request_id": "bad"}]}, None])
async def test_a_message_that_cannot_be_read_does_not_end_the_client(
    endpoint: str, unreadable: dict[str, object] | None
) -> None:
    """The worker used to be given up for it, with everyone's requests."""
    client = remote_worker(endpoint, max_waiting=2)
    with WorkerSocket(endpoint, Ready(make_info())) as socket:
        await client.start()
        (peer,) = await asyncio.to_thread(_wait_for_clients, socket)
        await reaches(client, "ready")
        stream = client.submit(make_request("bad"))
        socket.send(peer, unreadable)  # type: ignore[arg-type]
        (output,) = await collect(stream)
        assert (output.finish_reason, client.num_requests) == ("error", 0)
        assert client.status.state == "ready"
    await client.stop()


def _wait_for_clients(socket: WorkerSocket) -> list[bytes]:
    while not socket.clients:
        socket.receive(0.01)
    return list(socket.clients)
