"""The official `openai` package against a real server."""

import pytest
from openai import NotFoundError
from openai.types.chat import ChatCompletionMessageParam

from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


def test_chat_returns_the_scripted_answer_with_usage(server: RunningServer) -> None:
    completion = server.openai().chat.completions.create(model=MODEL_NAME, messages=HELLO)
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert completion.system_fingerprint is not None


def test_streamed_chat_adds_up_to_the_whole_answer(server: RunningServer) -> None:
    stream = server.openai().chat.completions.create(
        model=MODEL_NAME,
        messages=HELLO,
        stream=True,
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.choices[0].delta.role for chunk in chunks][:2] == ["assistant", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]


def test_include_usage_puts_the_usage_into_a_last_chunk_without_choices(server: RunningServer) -> None:
    *chunks, last = server.openai().chat.completions.create(
        model=MODEL_NAME,
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(ANSWER.encode()) + 1 - _num_merged(server)


def _num_merged(server: RunningServer) -> int:
    """Bytes of the answer that share a token with another."""
    return len(ANSWER.encode()) - len(server.engine.answer_ids)


def test_the_stream_helper_assembles_the_completion(server: RunningServer) -> None:
    with server.openai().chat.completions.stream(model=MODEL_NAME, messages=HELLO) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER


async def test_async_completion_stream_adds_up(server: RunningServer) -> None:
    async with server.async_openai() as client:
        stream = await client.completions.create(model=MODEL_NAME, prompt="Say:", max_tokens=200, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER


def test_n_choices_for_each_of_several_prompts_come_in_order(server: RunningServer) -> None:
    completion = server.openai().completions.create(
        model=MODEL_NAME, prompt=["one", "two"], n=2, echo=True, max_tokens=3, seed=7
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in completion.choices] == ["one", "one", "two", "two"]
    assert [request.choice_index for request in server.engine.requests[-4:]] == [0, 1, 0, 1]
    assert {choice.finish_reason for choice in completion.choices} == {"length"}


def test_completions_default_to_sixteen_tokens(server: RunningServer) -> None:
    completion = server.openai().completions.create(model=MODEL_NAME, prompt="Say:")
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16


def test_token_ids_are_a_prompt_too(server: RunningServer) -> None:
    server.openai().completions.create(model=MODEL_NAME, prompt=[[5, 6, 7], [8]], max_tokens=1)
    assert [request.prompt_ids for request in server.engine.requests[-2:]] == [(5, 6, 7), (8,)]


def test_models_are_listed_and_found_by_a_name_with_a_slash(server: RunningServer) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


def test_the_served_name_replaces_the_models_own() -> None:
    with running(ScriptedEngine(), served_model_names="mine") as server:
        assert [model.id for model in server.openai().models.list()] == ["mine"]
        completion = server.openai().completions.create(model="mine", prompt="Say:")
        assert completion.model == "mine"
