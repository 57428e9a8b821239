"""The pipe between ranks."""

import io

import torch

from cllm_core.models.paged import RowSpan
from cllm_core.parallel.messages import (
    AllocateCache,
    ClearBlocks,
    Forward,
    FreeCache,
    Message,
    read_message,
    write_message,
)


def test_messages_come_as_they_were_sent_until_the_pipe_is_closed() -> None:
    tokens = torch.tensor([5, 6, 7])
    rows = [RowSpan(0, 2, 10, (3, 4)), RowSpan(2, 1, 0, (9,), adapter_id=0)]
    sent: list[Message] = [
        AllocateCache(7, 16),
        Forward.of(tokens, tokens + 10, rows, tokens[:1]),
        ClearBlocks((3, 1)),
        FreeCache(),
    ]
    pipe = io.BytesIO()
    for message in sent:
        write_message(pipe, message)
    pipe.seek(0)
    received = [read_message(pipe) for _ in range(5)]
    assert received == [*sent, None]
    forward = received[1]
    assert isinstance(forward, Forward)
    input_ids, positions, sampled = forward.tensors(torch.device("cpu"))
    assert (input_ids.tolist(), positions.tolist(), sampled.tolist()) == ([5, 6, 7], [15, 16, 17], [5])


def test_a_pipe_that_breaks_within_a_message_is_closed() -> None:
    pipe = io.BytesIO()
    write_message(pipe, AllocateCache(7, 16))
    assert read_message(io.BytesIO(pipe.getvalue()[:-1])) is None
    assert read_message(io.BytesIO(pipe.getvalue()[:3])) is None
