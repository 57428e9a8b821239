"""The official Python client beyond plain calls: raw responses, helpers, timeouts and retries."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from openai import APITimeoutError, InternalServerError, OpenAI, RateLimitError
from openai.types.chat import ChatCompletionMessageParam

from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running, wait_until

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


def ask(client: OpenAI) -> str | None:
    return client.chat.completions.create(model=MODEL_NAME, messages=HELLO).choices[0].message.content


def test_a_raw_response_gives_headers_and_the_parsed_body(server: RunningServer) -> None:
    raw = server.openai().chat.completions.with_raw_response.create(
        model=MODEL_NAME, messages=HELLO, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().choices[0].message.content == ANSWER
    assert raw.parse()._request_id == "mine-1"


def test_a_streaming_response_can_be_read_line_by_line(server: RunningServer) -> None:
    with server.openai().chat.completions.with_streaming_response.create(
        model=MODEL_NAME, messages=HELLO, stream=True
    ) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER


def test_the_chat_stream_helper_reports_content_as_it_grows(server: RunningServer) -> None:
    with server.openai().chat.completions.stream(model=MODEL_NAME, messages=HELLO) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "content.delta"]
        done = stream.get_final_completion()
    assert all(later.startswith(earlier) for earlier, later in pairwise(snapshots))
    assert snapshots[-1] == done.choices[0].message.content == ANSWER


async def test_the_async_client_runs_calls_of_all_kinds_side_by_side(server: RunningServer) -> None:
    async with server.async_openai() as client:
        chat, completion, response, models = await asyncio.gather(
            client.chat.completions.create(model=MODEL_NAME, messages=HELLO),
            client.completions.create(model=MODEL_NAME, prompt="Say:", max_tokens=200),
            client.responses.create(model=MODEL_NAME, input="Hello"),
            client.models.list(),
        )
    texts = [chat.choices[0].message.content, completion.choices[0].text, response.output_text]
    assert texts == [ANSWER] * 3
    assert [model.id for model in models.data] == [MODEL_NAME]


def test_a_client_that_gives_up_frees_what_it_held() -> None:
    engine = ScriptedEngine(step_seconds=0.5, endless=True)
    with running(engine) as server:
        with pytest.raises(APITimeoutError):
            ask(server.openai().with_options(timeout=0.1))
        wait_until(lambda: server.in_loop(lambda: engine.num_open) == 0)
        assert len(engine.aborted) == 1


def recovers_after(seconds: float, recover: Callable[[], None]) -> None:
    threading.Timer(seconds, recover).start()


def test_the_client_comes_back_when_a_restarting_server_told_it_to() -> None:
    engine = ScriptedEngine()
    with running(engine) as server:
        server.in_loop(lambda: engine.become("restarting"))
        with pytest.raises(InternalServerError):
            ask(server.openai())
        recovers_after(0.2, lambda: server.in_loop(lambda: engine.become("ready")))
        start = time.monotonic()
        assert ask(server.openai().with_options(max_retries=1)) == ANSWER
        assert time.monotonic() - start > 1.5  # Retry-After, not the client's own half second


def test_the_client_comes_back_to_a_server_that_was_busy() -> None:
    engine = ScriptedEngine(capacity=0)
    with running(engine) as server:
        with pytest.raises(RateLimitError) as caught:
            ask(server.openai())
        assert caught.value.response.headers["retry-after"] == "3"
        recovers_after(0.2, lambda: server.in_loop(lambda: engine.grow(1)))
        assert ask(server.openai().with_options(max_retries=1)) == ANSWER
