"""Stored responses: continued, asked for again, referred to and deleted, by the official client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseItemList
from pydantic import BaseModel

from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running, wait_until
from tests.server.openai.responses.test_tools import SAID, WEATHER, WRITTEN

RESPONSES = "/v1/responses"


@pytest.fixture(scope="module")
def off() -> Iterator[RunningServer]:
    with running(ScriptedEngine(), response_store="off") as server:
        yield server


def prompt_of(server: RunningServer) -> str:
    return server.engine.decode(server.engine.requests[-1].prompt_ids)


def create(client: openai.OpenAI, text: Any = "Hi", **fields: Any) -> Any:
    return client.responses.create(model=MODEL_NAME, input=text, **fields)


def test_a_conversation_goes_on_from_stored_responses(server: RunningServer) -> None:
    client = server.openai()
    first = create(client, "One", instructions="Be brief.")
    second = create(client, "Two", previous_response_id=first.id)
    assert (second.previous_response_id, second.store) == (first.id, True)
    third = create(client, [{"role": "user", "content": "Three"}], previous_response_id=second.id, stream=True)
    assert [event.type for event in third][-1] == "response.completed"
    asked = f"<user>One\n<assistant>{ANSWER}\n<user>Two\n<assistant>{ANSWER}\n<user>Three\n<assistant>"
    assert prompt_of(server) == asked  # instructions hold for one response


def test_a_streamed_response_can_be_continued_as_soon_as_it_is_complete(server: RunningServer) -> None:
    client = server.openai()
    with client.responses.stream(model=MODEL_NAME, input="One") as stream:
        first = stream.get_final_response()
    create(client, "Two", previous_response_id=first.id)
    assert prompt_of(server) == f"<user>One\n<assistant>{ANSWER}\n<user>Two\n<assistant>"
    assert client.responses.retrieve(first.id).output_text == first.output_text


def test_calls_and_their_results_are_part_of_a_stored_conversation() -> None:
    with running(ScriptedEngine(f"{SAID}\n{WRITTEN}", info=make_info(max_model_len=4096))) as server:
        client = server.openai()
        first = create(client, tools=[WEATHER])
        call = next(item for item in first.output if item.type == "function_call")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "5 degrees"}
        second = create(client, [result], tools=[WEATHER], previous_response_id=first.id)
        stored = prompt_of(server)
        sent = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in first.output), result]
        create(client, sent, tools=[WEATHER])
        assert stored == prompt_of(server)
        assert second.output_text == SAID


def test_output_sent_back_as_it_was_dumped_reads_the_same(server: RunningServer) -> None:
    client = server.openai()
    first = create(client, include=["message.output_text.logprobs"])
    answer = server.shared_http.post(
        RESPONSES,
        json={"model": MODEL_NAME, "input": [{"role": "user", "content": "Hi"}, *first.model_dump()["output"]]},
    )
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers
    assert prompt_of(server) == f"<user>Hi\n<assistant>{ANSWER}\n<assistant>"


class Sky(BaseModel):
    colour: str


def test_a_parsed_answer_can_be_continued() -> None:
    with running(ScriptedEngine('{"colour": "blue"}')) as server:
        client = server.openai()
        first = client.responses.parse(model=MODEL_NAME, input="Hi", text_format=Sky)
        assert first.output_parsed == Sky(colour="blue")
        history: Any = [{"role": "user", "content": "Hi"}, *first.output, {"role": "user", "content": "And?"}]
        create(client, history)
        assert prompt_of(server) == '<user>Hi\n<assistant>{"colour": "blue"}\n<user>And?\n<assistant>'


def test_a_stored_response_is_shown_and_deleted(server: RunningServer) -> None:
    client = server.openai()
    first = create(client, metadata={"a": "b"}, user="me")
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    client.responses.delete(first.id)
    for attempt in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match=first.id):
            attempt(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"


def test_input_items_are_listed_page_by_page(server: RunningServer) -> None:
    client = server.openai()
    history: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "One"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Two", "annotations": []}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "5"}]},
    ]
    answer = create(client, history)
    kinds = [getattr(item, "role", item.type) for item in client.responses.input_items.list(answer.id, limit=2)]
    assert kinds == ["function_call_output", "function_call", "assistant", "reasoning", "user", "developer"]
    url = f"{RESPONSES}/{answer.id}/input_items"
    page = server.shared_http.get(url, params={"order": "asc", "limit": 4})
    listed = ResponseItemList.model_validate_json(page.content, strict=True)
    assert (len(listed.data), listed.has_more, listed.first_id) == (4, True, listed.data[0].id)
    rest = server.shared_http.get(url, params={"order": "asc", "after": listed.last_id}).json()
    assert [item["type"] for item in rest["data"]] == ["function_call", "function_call_output"]
    assert not rest["has_more"]


@pytest.mark.parametrize(
    ("path", "param"),
    [("?stream=true", "stream"), ("/input_items?limit=0", "limit"), ("/input_items?order=up", "order"),
     ("/input_items?after=msg_none", "after")],
)  # fmt: skip
def test_queries_that_make_no_sense_are_refused_by_name(server: RunningServer, path: str, param: str) -> None:
    response = server.shared_http.get(f"{RESPONSES}/{create(server.openai()).id}{path}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_references_stand_for_stored_items(server: RunningServer) -> None:
    client = server.openai()
    item_id = create(client, "One").output[0].id
    items = server.shared_http.get(f"{RESPONSES}/{create(client, 'Two').id}/input_items").json()["data"]
    question = {"role": "user", "content": "And?"}
    answer = create(client, [{"type": "item_reference", "id": items[0]["id"]}, {"id": item_id}, question])
    assert prompt_of(server) == f"<user>Two\n<assistant>{ANSWER}\n<user>And?\n<assistant>"
    # What was referred to is part of that response from now on.
    create(client, "More", previous_response_id=answer.id)
    assert prompt_of(server).startswith(f"<user>Two\n<assistant>{ANSWER}\n<user>And?\n<assistant>{ANSWER}\n<user>More")


def test_what_is_not_to_be_stored_is_not(server: RunningServer) -> None:
    client = server.openai()
    answer = create(client, store=False)
    assert answer.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_keys_see_their_own_responses_only() -> None:
    with running(ScriptedEngine(), api_keys=("one", "two")) as server:
        mine, other = server.openai("one"), server.openai("two")
        answer = create(mine)
        assert mine.responses.retrieve(answer.id).id == answer.id
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(answer.id)
        with pytest.raises(openai.BadRequestError):
            create(other, previous_response_id=answer.id)
        with pytest.raises(openai.BadRequestError):
            create(other, [{"type": "item_reference", "id": answer.output[0].id}])
        with pytest.raises(openai.AuthenticationError):
            server.openai("three").responses.retrieve(answer.id)


def test_without_a_store_nothing_is_stored_and_this_is_said(off: RunningServer) -> None:
    answer = off.shared_http.post(RESPONSES, json={"model": MODEL_NAME, "input": "Hi", "store": True})
    assert (answer.status_code, answer.headers["x-ignored-fields"], answer.json()["store"]) == (200, "store", False)
    assert "x-ignored-fields" not in off.shared_http.post(RESPONSES, json={"model": MODEL_NAME, "input": "Hi"}).headers
    client = off.openai()
    with pytest.raises(openai.BadRequestError, match="response-store off") as caught:
        create(client, previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError, match="response-store off"):
        create(client, [{"type": "item_reference", "id": "msg_1"}])
    with pytest.raises(openai.NotFoundError, match="response-store off"):
        client.responses.retrieve("resp_1")


def test_a_file_keeps_responses_beyond_the_server(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")
    with running(ScriptedEngine(), response_store=path) as server:
        first = create(server.openai(), "One")
    with running(ScriptedEngine(), response_store=path) as server:
        create(server.openai(), "Two", previous_response_id=first.id)
        assert prompt_of(server) == f"<user>One\n<assistant>{ANSWER}\n<user>Two\n<assistant>"


@pytest.mark.parametrize("stream", [False, True])
def test_a_store_that_fails_costs_no_answer(tmp_path: Path, stream: bool) -> None:
    path = tmp_path / "responses.db"
    path.write_bytes(b"not a database" * 1000)
    with running(ScriptedEngine(), response_store=str(path)) as server:
        client = server.openai()
        answer = [*create(client, stream=True)][-1].response if stream else create(client)
        assert (answer.output_text, answer.status, answer.to_dict()["store"]) == (ANSWER, "completed", False)
        with pytest.raises(openai.InternalServerError, match="send the whole conversation") as caught:
            create(client, previous_response_id=answer.id)
        assert (caught.value.status_code, caught.value.code) == (503, "store_unavailable")


def stored_of(server: RunningServer, response_id: str) -> dict[str, Any]:
    wait_until(lambda: server.shared_http.get(f"{RESPONSES}/{response_id}").status_code == 200)
    body: dict[str, Any] = server.shared_http.get(f"{RESPONSES}/{response_id}").json()
    return body


@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_that_ends_early_is_stored_as_far_as_it_came(fails: bool) -> None:
    with running(ScriptedEngine(endless=True, step_seconds=0.01)) as server:
        stream = create(server.openai(), stream=True)
        begun = next(stream)
        while next(stream).type != "response.output_text.delta":
            pass
        if fails:
            server.in_loop(server.engine.kill_worker)
            assert [event.type for event in stream][-1] == "response.failed"
        else:
            stream.close()
        stored = stored_of(server, begun.response.id)
        assert stored["status"] == ("failed" if fails else "cancelled")
        assert (stored["error"] is not None) == fails
        [item] = stored["output"]
        assert item["status"] == "incomplete"
        assert item["content"][0]["text"]


def test_browsers_may_delete_responses() -> None:
    with running(ScriptedEngine(), cors_origins=("http://page",)) as server:
        headers = {"origin": "http://page", "access-control-request-method": "DELETE"}
        response: httpx.Response = server.shared_http.options(f"{RESPONSES}/resp_1", headers=headers)
        assert "DELETE" in response.headers["access-control-allow-methods"]
