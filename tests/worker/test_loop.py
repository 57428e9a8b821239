"""WorkerLoop and WorkerSocket against bare sockets, so that the client's own care cannot hide a fault."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import msgspec
import pytest
import zmq

from cllm_core.config import EngineConfig
from cllm_core.info import EngineStats
from cllm_core.request import RequestOutput, SamplingParams
from cllm_core.worker.loop import WorkerLoop
from cllm_core.worker.messages import (
    Abort,
    AdapterDone,
    Alive,
    Failed,
    FromWorker,
    Hello,
    LoadAdapter,
    Ping,
    Ready,
    Rejected,
    Shutdown,
    StepReport,
    Submit,
    ToWorker,
    UnloadAdapter,
)
from cllm_core.worker.transport import WorkerSocket
from tests.worker.conftest import ThreadWorker
from tests.worker.fake_engine import (
    BREAKS_ADMISSION,
    PREPARED,
    REFUSED,
    SLOW_STEPS,
    STEP_DEADLINE,
    FakeEngine,
    make_request,
)

ENDLESS = 10**6


class Peer:
    """A client without any logic."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(endpoint)
        self._decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def send(self, *messages: ToWorker) -> None:
        for message in messages:
            self.send_bytes(msgspec.msgpack.encode(message))

    def send_bytes(self, payload: bytes) -> None:
        self._socket.send(payload)

    def receive(self) -> FromWorker:
        """The next message but for signs of life."""
        while isinstance(message := self.receive_any(), Alive):
            pass
        return message

    def receive_any(self) -> FromWorker:
        assert self._socket.poll(5000), "the worker did not answer"
        return self._decoder.decode(self._socket.recv())

    def greet(self) -> Self:
        self.send(Hello())
        while not isinstance(self.receive(), Ready):
            pass
        return self

    def outputs(self, num_requests: int = 1) -> list[RequestOutput]:
        """All outputs until this many requests have ended."""
        outputs: list[RequestOutput] = []
        while sum(output.finish_reason is not None for output in outputs) < num_requests:
            message = self.receive()
            if isinstance(message, StepReport):
                outputs += message.outputs
        return outputs


class EngineThatFails(FakeEngine):
    """In its fifth step."""

    def step(self) -> list[RequestOutput]:
        if self._num_steps == 4:
            raise RuntimeError("device-side assert triggered")
        return super().step()


class EngineThatSlowsDown(FakeEngine):
    """From its fourth step on."""

    def step_deadline(self) -> float:
        return 1.0 if self._num_steps < 3 else 7.0


class EngineWithQueue(FakeEngine):
    """One request waits beside those that run."""

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(super().stats(), num_waiting=1)


class EngineThatAdmits(EngineWithQueue):
    """Asks in its fifth step what the client has heard by then."""

    def __init__(self, config: EngineConfig, ask: Callable[[], None]) -> None:
        super().__init__(config)
        self._ask = ask

    def step(self) -> list[RequestOutput]:
        if self._num_steps == 4:
            self._ask()
        return super().step()


@pytest.fixture
def peer(worker: ThreadWorker) -> Iterator[Peer]:
    with Peer(worker.endpoint) as peer:
        yield peer.greet()


def test_each_step_is_one_report(peer: Peer) -> None:
    peer.send(Submit(make_request(prompt=(1, 2, 3), max_tokens=3)))
    reports = [peer.receive() for _ in range(3)]
    assert [report.outputs[0].token_ids for report in reports if isinstance(report, StepReport)] == [(4,), (5,), (6,)]


@pytest.fixture
def patient_peer(endpoint: str) -> Iterator[Peer]:
    """Of a worker that would gather outputs for a minute."""
    worker = ThreadWorker(endpoint, stream_interval=60.0)
    with Peer(endpoint) as peer:
        yield peer.greet()
    worker.stop()


def test_first_and_last_tokens_do_not_wait_for_the_stream_interval(patient_peer: Peer) -> None:
    patient_peer.send(Submit(make_request(prompt=(0,), max_tokens=50)))
    assert [output.token_ids for output in patient_peer.outputs()] == [(1,), tuple(range(2, 51))]


@pytest.mark.parametrize("change", [{"wants_draft": True}, {"params": SamplingParams(max_tokens=3, stop=("x",))}])
def test_requests_that_look_at_every_step_wait_for_none(patient_peer: Peer, change: dict[str, Any]) -> None:
    patient_peer.send(Submit(msgspec.structs.replace(make_request(prompt=(0,)), **change)))
    assert [output.token_ids for output in patient_peer.outputs()] == [(1,), (2,), (3,)]


def test_tokens_that_waited_come_before_the_failure_of_the_engine(endpoint: str) -> None:
    engine = EngineThatFails(EngineConfig())
    with WorkerSocket(endpoint, Ready(engine.info)) as channel, Peer(endpoint) as peer:
        peer.send(Hello(), Submit(make_request(prompt=(0,), max_tokens=ENDLESS)))
        with pytest.raises(RuntimeError, match="device-side assert"):
            WorkerLoop(engine, channel, lambda: False, stream_interval=60.0).run()
        reports = [peer.receive() for _ in range(3)][1:]  # behind the greeting
        outputs = [
            output.token_ids for report in reports if isinstance(report, StepReport) for output in report.outputs
        ]
        assert outputs == [(1,), (2, 3, 4)]


@pytest.mark.parametrize(
    "command",
    [
        Submit(make_request("refused", prompt=(REFUSED,))),
        LoadAdapter("1", "sql", "adapters/sql"),
        UnloadAdapter("1", "unknown"),
    ],
)
def test_tokens_that_waited_come_before_what_holds_the_loop_up(endpoint: str, command: ToWorker) -> None:
    """They used to wait until an adapter was loaded, or a grammar compiled and a prompt read."""
    worker = ThreadWorker(endpoint, stream_interval=60.0)
    try:
        with Peer(endpoint) as peer:
            peer.greet().send(Submit(make_request("endless", prompt=(SLOW_STEPS,), max_tokens=ENDLESS)))
            while worker.engine.stats().num_steps < 5:
                time.sleep(0.01)
            peer.send(command)
            num_heard = 0
            while not isinstance(message := peer.receive(), Rejected | AdapterDone):
                if isinstance(message, StepReport):
                    num_heard = message.steps[-1].num_steps
        assert num_heard == worker.engine.num_steps_before_command >= 5
    finally:
        worker.stop()


def test_tokens_that_waited_come_before_the_prompt_of_a_request_from_the_queue(endpoint: str) -> None:
    with Peer(endpoint) as peer:
        heard: list[int] = []

        def listen() -> None:
            while len(heard) < 4:
                if isinstance(message := peer.receive(), StepReport):
                    heard.extend(token_id for output in message.outputs for token_id in output.token_ids)

        engine = EngineThatAdmits(EngineConfig(), listen)
        with WorkerSocket(endpoint, Ready(engine.info)) as channel:
            peer.send(Hello(), Submit(make_request(prompt=(0,), max_tokens=ENDLESS)))
            WorkerLoop(engine, channel, lambda: engine.stats().num_steps > 4, stream_interval=60.0).run()
    assert heard == [1, 2, 3, 4]


def test_a_queue_behind_a_full_house_makes_no_token_go_earlier(endpoint: str) -> None:
    engine = EngineWithQueue(EngineConfig(max_num_seqs=1))
    with WorkerSocket(endpoint, Ready(engine.info)) as channel, Peer(endpoint) as peer:
        peer.send(Hello(), Submit(make_request(prompt=(0,), max_tokens=9)))
        WorkerLoop(engine, channel, lambda: engine.stats().num_steps == 9, stream_interval=60.0).run()
        assert [output.token_ids for output in peer.outputs()] == [(1,), tuple(range(2, 10))]


def test_a_client_without_requests_hears_about_once_a_second(worker: ThreadWorker, peer: Peer) -> None:
    with Peer(worker.endpoint) as idle:
        idle.greet()
        started = time.monotonic()
        peer.send(Submit(make_request(max_tokens=300)))
        peer.outputs()
        num_heard, num_reports = 0, 0
        while num_heard < 300:
            message = idle.receive()
            assert isinstance(message, StepReport)
            num_heard, num_reports = message.steps[-1].num_steps, num_reports + 1
        # One with the first step and one with the last, whatever the time between them.
        assert num_reports <= 2 + (time.monotonic() - started)


def test_a_refused_request_ends_and_the_others_go_on(peer: Peer) -> None:
    peer.send(Submit(make_request("bad", prompt=(REFUSED,))), Submit(make_request("good")))
    rejected = peer.receive()
    assert isinstance(rejected, Rejected)
    assert (rejected.request_id, "valid ids" in rejected.error) == ("bad", True)
    assert peer.outputs()[-1].request_id == "good"


def test_an_aborted_request_ends_in_one_output_though_no_work_is_left(peer: Peer) -> None:
    peer.send(Submit(make_request(max_tokens=ENDLESS)), Abort(("r",)))
    assert peer.outputs()[-1].finish_reason == "abort"


def test_aborting_what_is_unknown_changes_nothing(peer: Peer) -> None:
    peer.send(Abort(("nobody",)), Submit(make_request()))
    assert [output.finish_reason for output in peer.outputs()] == [None, None, "length"]


def test_shutdown_ends_every_request_with_abort(peer: Peer) -> None:
    peer.send(*(Submit(make_request(id, max_tokens=ENDLESS)) for id in "abc"), Shutdown())
    ends = {output.request_id: output.finish_reason for output in peer.outputs(3) if output.finish_reason}
    assert ends == {"a": "abort", "b": "abort", "c": "abort"}


def test_clients_see_their_own_outputs_only(worker: ThreadWorker, peer: Peer) -> None:
    with Peer(worker.endpoint) as other:
        other.greet()
        peer.send(Submit(make_request("mine", max_tokens=50)))
        other.send(Submit(make_request("theirs", max_tokens=50)), Abort(("mine",)))
        assert {output.request_id for output in other.outputs()} == {"theirs"}
    mine = peer.outputs()
    assert {output.request_id for output in mine} == {"mine"}
    assert mine[-1].finish_reason == "length"


def test_the_requests_of_a_client_that_vanished_are_aborted(worker: ThreadWorker, peer: Peer) -> None:
    with Peer(worker.endpoint) as other:
        other.greet().send(Submit(make_request("orphan", prompt=(SLOW_STEPS,), max_tokens=ENDLESS)))
        other.receive()
    peer.send(Submit(make_request("mine", max_tokens=20)))
    peer.outputs()
    assert worker.engine.aborted == ["orphan"]
    assert worker.engine.added == ["orphan", "mine"]


def test_a_client_found_gone_by_an_announcement_is_forgotten_too(endpoint: str) -> None:
    """No report would have found it: none is due for an hour."""
    worker = ThreadWorker(endpoint, stream_interval=3600.0)
    try:
        with Peer(endpoint) as peer:
            peer.greet()
            with Peer(endpoint) as other:
                other.greet().send(Submit(make_request("orphan", prompt=(SLOW_STEPS,), max_tokens=ENDLESS)))
                other.receive()
            for number in range(100):
                peer.send(LoadAdapter(str(number), f"adapter-{number}", "adapters/any"))
                while not isinstance(peer.receive(), AdapterDone):
                    pass
                if worker.engine.aborted:
                    break
        assert worker.engine.aborted == ["orphan"]
    finally:
        worker.stop()


def test_steps_of_others_go_on_while_a_request_is_prepared(worker: ThreadWorker, peer: Peer) -> None:
    peer.send(Submit(make_request("slow", prompt=(PREPARED,), max_tokens=2)))
    peer.send(Submit(make_request("quick", max_tokens=4)))
    assert {output.request_id for output in peer.outputs()} == {"quick"}
    assert worker.engine.added == ["quick"]
    worker.engine.preparing.set_result(None)
    assert [output.request_id for output in peer.outputs()] == ["slow", "slow"]


@pytest.mark.parametrize("command", [Abort(("slow",)), Shutdown()])
def test_a_request_that_leaves_while_it_is_prepared_never_runs(
    worker: ThreadWorker, peer: Peer, command: ToWorker
) -> None:
    peer.send(Submit(make_request("slow", prompt=(PREPARED,))), command)
    assert [(output.request_id, output.finish_reason) for output in peer.outputs()] == [("slow", "abort")]
    worker.engine.preparing.set_result(None)
    if isinstance(command, Abort):
        peer.send(Submit(make_request("next")))
        assert {output.request_id for output in peer.outputs()} == {"next"}
    assert "slow" not in worker.engine.added


def test_a_client_of_another_release_is_turned_away(worker: ThreadWorker) -> None:
    with Peer(worker.endpoint) as stranger:
        stranger.send(Hello(version=999))
        answer = stranger.receive()
        assert isinstance(answer, Failed)
        assert "same release" in answer.error


UNREADABLE = [b"", b"\xc1", b"GET / HTTP/1.1", msgspec.msgpack.encode({"type": "Exec"})]


@pytest.mark.parametrize("payload", UNREADABLE)
def test_a_stranger_who_sends_what_cannot_be_read_is_turned_away(worker: ThreadWorker, payload: bytes) -> None:
    with Peer(worker.endpoint) as stranger:
        stranger.send_bytes(payload)
        assert isinstance(stranger.receive(), Failed)


@pytest.mark.parametrize("payload", UNREADABLE)
def test_an_unreadable_message_does_not_end_its_client(peer: Peer, payload: bytes) -> None:
    """The answer used to be Failed, which the client takes for the end of the worker."""
    peer.send_bytes(payload)
    peer.send(Submit(make_request()))
    assert len(peer.outputs()) == 3


def test_a_request_that_cannot_be_read_ends_alone(peer: Peer) -> None:
    peer.send_bytes(msgspec.msgpack.encode({"type": "Submit", "request": {"request_id": "odd", "prompt_ids": "x"}}))
    rejected = peer.receive()
    assert isinstance(rejected, Rejected)
    assert (rejected.request_id, rejected.is_internal) == ("odd", True)


def test_an_adapter_call_that_cannot_be_read_is_answered(peer: Peer) -> None:
    peer.send_bytes(msgspec.msgpack.encode({"type": "LoadAdapter", "call_id": "7", "name": 1}))
    done = peer.receive()
    assert isinstance(done, AdapterDone)
    assert done.call_id == "7"
    assert done.error


def test_a_request_that_breaks_the_engine_at_admission_ends_alone(peer: Peer) -> None:
    """It used to end the worker, with everyone's requests."""
    peer.send(Submit(make_request("bad", prompt=(BREAKS_ADMISSION,))), Submit(make_request("good")))
    rejected = peer.receive()
    assert isinstance(rejected, Rejected)
    assert (rejected.request_id, rejected.is_internal) == ("bad", True)
    assert "secret" not in rejected.error
    assert peer.outputs()[-1].request_id == "good"


def test_a_ping_is_answered_between_two_steps_with_the_deadline_of_the_next(peer: Peer) -> None:
    peer.send(Submit(make_request(prompt=(SLOW_STEPS,), max_tokens=ENDLESS)), Ping())
    messages = [peer.receive_any() for _ in range(5)]
    assert Alive(STEP_DEADLINE, is_answer=True) in messages


def test_a_longer_deadline_is_sent_before_the_step(endpoint: str) -> None:
    engine = EngineThatSlowsDown(EngineConfig())
    with WorkerSocket(endpoint, Ready(engine.info)) as channel, Peer(endpoint) as peer:
        peer.send(Hello(), Submit(make_request(prompt=(0,), max_tokens=5)))
        WorkerLoop(engine, channel, lambda: engine.stats().num_steps == 5).run()
        messages = [peer.receive_any() for _ in range(8)]
    deadlines = [message.deadline for message in messages if isinstance(message, Alive)]
    assert deadlines == [1.0, 7.0]
    assert messages.index(Alive(7.0, is_answer=False)) == 5, "behind the reports of three steps"


def test_a_command_before_the_greeting_is_answered(worker: ThreadWorker) -> None:
    with Peer(worker.endpoint) as hasty:
        hasty.send(Submit(make_request()))
        assert isinstance(hasty.receive(), Failed)
    assert worker.engine.added == []
