"""Laws of the wire: bytes that are no message end neither the worker nor the client that reads them."""

import asyncio
import random

import msgspec
import pytest
import zmq
import zmq.asyncio

from cllm_core.worker.messages import Abort, Hello, Loading, Rejected
from cllm_core.worker.transport import Connection, Unreadable, WorkerSocket

_GREETING = Loading("", 0)
_NOT_UTF8 = b"\x81\xa4type\xa1\xff"
_NESTED = b"\x82\xa4type\xa5Hello\xa1x" + 5000 * b"\x91" + b"\x01"
_NESTED_ALONE = 5000 * b"\x91" + b"\x01"
_ID_NOT_UTF8 = b"\x82\xa4type\xa8Rejected\xaarequest_id\xa1\xff"
_UNREADABLE = [b"", _NOT_UTF8, _NESTED, _NESTED_ALONE, _ID_NOT_UTF8]
_IDS = ["empty", "not UTF-8", "nested in a field", "nested", "id not UTF-8"]


def _mutate(rng: random.Random, payload: bytes) -> bytes:
    changed = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("payload", _UNREADABLE, ids=_IDS)
def test_bytes_that_are_no_message_leave_the_worker_serving(tcp_endpoint: str, payload: bytes) -> None:
    """Text that is not UTF-8 and deep nesting raised out of `receive` and ended the worker."""
    with WorkerSocket(tcp_endpoint, _GREETING) as worker, zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.connect(tcp_endpoint)
        for sent in (msgspec.msgpack.encode(Hello()), payload, msgspec.msgpack.encode(Abort(("a",)))):
            peer.send(sent)
        commands = []
        for _ in range(20):
            commands += [command for _, command in worker.receive(0.1)]
            if commands:
                break
        assert commands == [Abort(("a",))]


async def test_bytes_that_are_no_message_leave_the_client_reading(tcp_endpoint: str) -> None:
    """The same bytes, and 500 messages with changed bytes, in the other direction."""
    rng = random.Random(0)
    sample = msgspec.msgpack.encode(Rejected("request", "an error"))
    payloads = [*_UNREADABLE, *(_mutate(rng, sample) for _ in range(500))]
    context = zmq.asyncio.Context()
    router: zmq.Socket[bytes] = zmq.Context.shadow(context.underlying).socket(zmq.ROUTER)
    router.bind(tcp_endpoint)
    connection = Connection(context, tcp_endpoint)
    try:
        connection.send(Hello())
        client = (await asyncio.to_thread(router.recv_multipart))[0]
        for payload in (*payloads, sample):
            router.send_multipart([client, payload])
        received: list[object] = []
        async with asyncio.timeout(4):
            while len(received) <= len(payloads):
                if (message := connection.receive_waiting()) is not None:
                    received.append(message)
                else:
                    await asyncio.sleep(0.01)
        assert all(isinstance(message, Unreadable) for message in received[: len(_UNREADABLE)])
        assert received[-1] == Rejected("request", "an error")
    finally:
        connection.close()
        router.close(linger=0)
        context.term()
