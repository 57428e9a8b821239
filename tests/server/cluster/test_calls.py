"""Answering an HTTP request in this process."""

import asyncio
from contextlib import aclosing

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.cluster.calls import HttpCall, answer

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
CALL = HttpCall({"method": "POST", "path": "/x", "headers": []}, b"the body")


def chunk(text: str, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


async def test_messages_come_as_they_are_sent() -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = await receive()
        assert scope["type"] == "http"
        await send(START)
        await send(chunk(request["body"].decode()))
        await gate.wait()
        await send(chunk("end", more=False))

    answers = answer(app, CALL)
    assert await anext(answers) == [START, chunk("the body")]
    gate.set()
    assert [messages async for messages in answers] == [[chunk("end", more=False)]]


async def test_an_answer_that_is_closed_early_ends_the_app() -> None:
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with aclosing(answer(app, CALL)) as answers:
        assert await anext(answers) == [START]
    assert ended.is_set()


async def test_an_app_learns_of_a_client_that_left_from_receive_too() -> None:
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(await receive())
        await send(START)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            received.append(await receive())
            raise

    async with aclosing(answer(app, CALL)) as answers:
        await anext(answers)
    assert [message["type"] for message in received] == ["http.request", "http.disconnect"]


async def test_an_error_of_the_app_is_raised_behind_what_it_sent() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        raise ValueError("broken")

    answers = answer(app, CALL)
    assert await anext(answers) == [START]
    with pytest.raises(ValueError, match="broken"):
        await anext(answers)


def test_a_call_takes_of_a_scope_what_can_be_sent() -> None:
    scope = {"type": "http", "path": "/x", "app": object(), "state": {}, "headers": [(b"a", b"b")]}
    assert HttpCall.of(scope, b"").scope == {"path": "/x", "headers": [(b"a", b"b")]}
