"""AdapterCalls: what a new worker has to hear, from what its predecessor was asked for."""

import msgspec
import pytest

from cllm_core.errors import EngineUnavailable, InvalidRequest
from cllm_core.info import AdapterInfo, ModelInfo
from cllm_core.worker.adapters import AdapterCalls
from cllm_core.worker.messages import AdapterDone, LoadAdapter, UnloadAdapter
from tests.worker.fake_engine import make_info


def serving(*names: str) -> ModelInfo:
    adapters = tuple(
        AdapterInfo(name=name, path=name, revision="1", rank=1, num_bytes=0, block_length=1, eos_token_ids=())
        for name in names
    )
    return msgspec.structs.replace(make_info(), adapters=adapters)


async def change(calls: AdapterCalls, *, load: str = "", unload: str = "", error: str | None = None) -> None:
    call, done = calls.load(load, f"adapters/{load}") if load else calls.unload(unload)
    calls.settle(AdapterDone(call.call_id, error))
    await done


async def test_a_new_worker_hears_only_of_what_differs_from_its_settings() -> None:
    calls = AdapterCalls()
    await change(calls, load="chat")
    await change(calls, unload="sql")
    told = calls.restore(serving("sql"))
    assert [(type(call), call.name) for call in told] == [(UnloadAdapter, "sql"), (LoadAdapter, "chat")]
    assert AdapterCalls().restore(serving("sql")) == []


async def test_a_new_worker_unloads_what_was_replaced_under_its_name() -> None:
    calls = AdapterCalls()
    await change(calls, unload="sql")
    await change(calls, load="sql")
    told = calls.restore(serving("sql"))
    assert [(type(call), call.name) for call in told] == [(UnloadAdapter, "sql"), (LoadAdapter, "sql")]
    loaded = told[-1]
    assert isinstance(loaded, LoadAdapter)
    assert loaded.path == "adapters/sql"


async def test_a_new_worker_is_ready_once_it_answered_to_all_even_with_an_error() -> None:
    calls = AdapterCalls()
    await change(calls, load="chat")
    (call,) = calls.restore(serving())
    states = [calls.is_restoring]
    calls.settle(AdapterDone(call.call_id, "the disk is gone"))
    assert [*states, calls.is_restoring] == [True, False]


async def test_what_was_refused_is_not_asked_for_again() -> None:
    calls = AdapterCalls()
    with pytest.raises(InvalidRequest, match="no such folder"):
        await change(calls, load="chat", error="no such folder")
    assert calls.restore(serving()) == []


async def test_calls_end_when_the_worker_is_lost() -> None:
    calls = AdapterCalls()
    _, done = calls.load("chat", "adapters/chat")
    calls.fail_all("the worker was lost")
    with pytest.raises(EngineUnavailable, match="the worker was lost"):
        await done


async def test_an_answer_nobody_waits_for_still_counts() -> None:
    """The client of the endpoint left while the worker was loading."""
    calls = AdapterCalls()
    call, done = calls.load("chat", "adapters/chat")
    done.cancel()
    calls.settle(AdapterDone(call.call_id))
    assert [again.name for again in calls.restore(serving())] == ["chat"]
