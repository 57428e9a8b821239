import asyncio

import pytest

from cllm_core.errors import InvalidRequest
from cllm_core.request import DecodingStats, FinishReason, RequestOutput
from cllm_core.worker.streams import LiveStreams, RequestStream
from tests.worker.fake_engine import make_request


def output(*token_ids: int, finish_reason: FinishReason | None = None) -> RequestOutput:
    stats = DecodingStats(num_prompt_tokens=3, num_output_tokens=len(token_ids))
    return RequestOutput(request_id="r", token_ids=token_ids, finish_reason=finish_reason, stats=stats)


def make_stream() -> tuple[RequestStream, list[str]]:
    abandoned: list[str] = []
    return RequestStream(make_request("r"), abandoned.append), abandoned


async def test_a_stream_yields_what_was_pushed_and_ends_after_the_last_output() -> None:
    stream, abandoned = make_stream()
    outputs = [output(1), output(2, finish_reason="stop")]
    for pushed in [*outputs, output(3)]:
        stream.push(pushed)
    assert [read async for read in stream] == outputs
    await stream.aclose()
    assert abandoned == []


async def test_a_refused_request_raises_what_was_wrong_with_it_once() -> None:
    stream, abandoned = make_stream()
    stream.refuse("prompt holds token 900")
    stream.end("error")
    with pytest.raises(InvalidRequest, match="holds token 900"):
        await anext(stream)
    assert [read async for read in stream] == []
    await stream.aclose()
    assert abandoned == []


async def test_a_stream_closed_before_its_first_output_is_abandoned_once() -> None:
    stream, abandoned = make_stream()
    await stream.aclose()
    await stream.aclose()
    stream.end("error")
    assert abandoned == ["r"]
    assert [read async for read in stream] == []


async def test_a_cancelled_reader_abandons_its_request_once() -> None:
    stream, abandoned = make_stream()
    reader = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait({reader})
    await stream.aclose()
    assert reader.cancelled()
    assert abandoned == ["r"]


async def test_closing_a_stream_wakes_the_reader_in_another_task() -> None:
    stream, _ = make_stream()
    reader = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0)
    await stream.aclose()
    assert await reader is None


async def test_what_is_thrown_into_a_stream_abandons_it() -> None:
    stream, abandoned = make_stream()
    with pytest.raises(KeyError):
        await stream.athrow(KeyError("reader failed"))
    assert abandoned == ["r"]


async def test_an_end_from_outside_keeps_the_statistics_so_far() -> None:
    stream, _ = make_stream()
    stream.push(output(1))
    stream.end("error", "the worker died")
    _, last = [read async for read in stream]
    assert (last.finish_reason, last.error, last.stats.num_output_tokens) == ("error", "the worker died", 1)


async def test_an_id_is_taken_until_the_worker_is_done_with_it() -> None:
    streams = LiveStreams()
    stream = streams.open(make_request("r"), lambda _: None)
    await stream.aclose()
    with pytest.raises(InvalidRequest, match="'r'"):
        streams.open(make_request("r"), lambda _: None)
    streams.deliver(output(finish_reason="abort"))
    assert len(streams) == 0
    streams.open(make_request("r"), lambda _: None)


async def test_outputs_of_unknown_requests_are_ignored() -> None:
    streams = LiveStreams()
    streams.deliver(output(1, finish_reason="stop"))
    streams.reject("r", "too late")
    await streams.wait_idle()
    assert len(streams) == 0


async def test_aborting_all_names_only_those_that_still_run() -> None:
    streams = LiveStreams()
    left, running = (streams.open(make_request(id), lambda _: None) for id in ("left", "running"))
    await left.aclose()
    assert streams.abort_all() == ("running",)
    assert [read.finish_reason async for read in running] == ["abort"]
    assert len(streams) == 2
