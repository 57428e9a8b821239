from typing import get_args

import msgspec
import pytest

from cllm_core.info import EngineStats
from cllm_core.request import DecodingStats, NewRequest, RequestOutput, SamplingParams, TokenLogprobs
from cllm_core.worker.messages import (
    Abort,
    AdapterDone,
    Alive,
    Failed,
    FromWorker,
    Hello,
    LoadAdapter,
    Loading,
    Ping,
    Ready,
    Rejected,
    Shutdown,
    StepReport,
    Submit,
    ToWorker,
    UnloadAdapter,
)
from tests.worker.fake_engine import make_info

REQUEST = NewRequest(
    request_id="chat-1",
    prompt_ids=(1, 2),
    params=SamplingParams(
        temperature=0.5, logit_bias={7: -1.0}, seed=-3, stop=("\n",), stop_token_ids=(2,), logprobs=1
    ),
    choice_index=1,
    prediction_ids=(5,),
    cache_salt="tenant",
)
OUTPUT = RequestOutput(
    request_id="chat-1",
    token_ids=(5, 6),
    logprobs=(TokenLogprobs(-0.5, (5,), (-0.5,)), TokenLogprobs(-1.5, (7,), (-0.25,))),
    finish_reason="stop",
    stop_token_id=6,
    stats=DecodingStats(num_prompt_tokens=2, num_output_tokens=2, num_forward_passes=1),
)


TO_WORKER = [
    Hello(),
    Submit(REQUEST),
    Abort(("a", "b")),
    LoadAdapter("7", "sql", "adapters/sql"),
    UnloadAdapter("8", "sql"),
    Ping(),
    Shutdown(),
]
FROM_WORKER = [
    Loading("weights", 0.25),
    Ready(make_info()),
    StepReport((OUTPUT,), (EngineStats(), EngineStats(num_running=1, accepted_per_row=(2, 1)))),
    Rejected("chat-1", "too long"),
    AdapterDone("7", "no such folder"),
    Alive(1.5, is_answer=True),
    Failed("out of memory", retry=True),
]


@pytest.mark.parametrize("message", TO_WORKER)
def test_what_the_client_sends_is_what_the_worker_reads(message: ToWorker) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToWorker) == message


@pytest.mark.parametrize("message", FROM_WORKER)
def test_what_the_worker_sends_is_what_the_client_reads(message: FromWorker) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromWorker) == message


def test_every_message_is_among_those_tested() -> None:
    assert {type(message) for message in TO_WORKER} == set(get_args(ToWorker))
    assert {type(message) for message in FROM_WORKER} == set(get_args(FromWorker))
