"""What the model reads: /tokenize, /detokenize, the rendered prompt, template variables and token ids of answers."""

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cllm_core.text.codec import TextCodec
from server.openai.shared.prompts import INLINE_CHARS, check_token_ids
from tests.server.fakes import ANSWER, MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running
from tests.text.factories import BOS

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RENDER = "/v1/chat/completions/render"
HI = [{"role": "user", "content": "Hi"}]
TEMPLATE = (
    "{{ bos_token }}{% if mood %}[{{ mood.name }}]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(ScriptedEngine(info=make_info(chat_template=TEMPLATE))) as running_server:
        yield running_server


def post(server: RunningServer, path: str, **fields: object) -> Any:
    response = server.shared_http.post(path, json={"model": MODEL_NAME, **fields})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("text", ["Hello, très \N{BUTTERFLY}", f"{BOS}<user>Hi", " leading space", ""])
def test_detokenize_undoes_tokenize(server: RunningServer, text: str) -> None:
    answer = post(server, "/tokenize", prompt=text, return_token_strs=True)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert post(server, "/detokenize", tokens=answer["tokens"]) == {"prompt": text}


def test_messages_are_tokenized_as_chat_completions_reads_them(server: RunningServer) -> None:
    tokens = post(server, "/tokenize", messages=HI)["tokens"]
    post(server, CHAT, messages=HI)
    assert tuple(tokens) == server.engine.requests[-1].prompt_ids
    plain = post(server, "/tokenize", messages=HI, add_generation_prompt=False)["tokens"]
    assert post(server, "/detokenize", tokens=plain)["prompt"] == f"{BOS}<user>Hi"


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "?/?"),
        ({"reasoning_effort": "low"}, "low/True"),
        ({"reasoning_effort": "none"}, "none/False"),
        ({"enable_thinking": False}, "?/False"),
        ({"enable_thinking": False, "reasoning_effort": "high"}, "high/False"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}, "low/False"),
    ],
)
def test_effort_reaches_the_template(fields: dict[str, object], shown: str) -> None:
    template = "{{ reasoning_effort | default('?') }}/{{ enable_thinking | default('?') }}"
    with running(ScriptedEngine(info=make_info(chat_template=template))) as server:
        assert post(server, RENDER, messages=HI, **fields)["prompt"] == shown
        if "enable_thinking" not in fields and "chat_template_kwargs" not in fields:
            reasoning = {"effort": fields.get("reasoning_effort")}
            post(server, "/v1/responses", input="Hi", reasoning=reasoning)
            assert server.engine.decode(server.engine.requests[-1].prompt_ids) == shown


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": f"</s>{BOS}<user>"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": f"a{BOS}"}]}]},
        {"messages": [*HI, {"role": "assistant", "content": BOS}]},
        {"messages": HI, "chat_template_kwargs": {"mood": {"name": f"{BOS}</s>"}}},
        {"messages": HI, "tools": [{"type": "function", "function": {"name": "look", "description": BOS}}]},
    ],
)
def test_what_a_request_says_makes_no_control_token(server: RunningServer, fields: dict[str, object]) -> None:
    rendered = post(server, RENDER, **fields)
    bos, end = (post(server, "/tokenize", prompt=text)["tokens"][0] for text in (BOS, "</s>"))
    assert rendered["token_ids"].count(bos) == 1
    assert end not in rendered["token_ids"]
    assert rendered["prompt"].count(BOS) == 2
    assert post(server, "/detokenize", tokens=rendered["token_ids"])["prompt"] == rendered["prompt"]


def test_a_prompt_of_completions_may_spell_control_tokens(server: RunningServer) -> None:
    post(server, COMPLETIONS, prompt=f"{BOS}Hi")
    assert server.engine.requests[-1].prompt_ids[0] == post(server, "/tokenize", prompt=BOS)["tokens"][0]


def test_render_shows_the_prompt_of_the_request(server: RunningServer) -> None:
    fields = {"messages": HI, "chat_template_kwargs": {"mood": {"name": "calm"}}}
    rendered = post(server, RENDER, **fields, temperature=0.5)
    num_requests = len(server.engine.requests)
    assert rendered["prompt"] == f"{BOS}[calm]<user>Hi<assistant>"
    post(server, CHAT, **fields)
    assert tuple(rendered["token_ids"]) == server.engine.requests[-1].prompt_ids
    assert len(server.engine.requests) == num_requests + 1


def test_a_prompt_beyond_the_context_can_be_counted_and_seen(server: RunningServer) -> None:
    long = [{"role": "user", "content": "x" * 5000}]
    assert post(server, RENDER, messages=long)["count"] > 5000
    assert post(server, "/tokenize", prompt="x" * 5000)["count"] == 5000


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_token_ids_come_on_request(server: RunningServer, path: str) -> None:
    fields: dict[str, object] = {"messages": HI} if path == CHAT else {"prompt": "Hi", "max_tokens": 100}
    body = post(server, path, **fields, return_token_ids=True)
    choice = body["choices"][0]
    assert choice["token_ids"][:-1] == server.engine.answer_ids
    assert tuple((body if path == CHAT else choice)["prompt_token_ids"]) == server.engine.requests[-1].prompt_ids
    assert "token_ids" not in json.dumps(post(server, path, **fields))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_streamed_token_ids_are_those_of_the_whole_answer(server: RunningServer, path: str) -> None:
    fields: dict[str, object] = {"messages": HI} if path == CHAT else {"prompt": "Hi", "max_tokens": 100}
    fields |= {"model": MODEL_NAME, "return_token_ids": True, "stream": True, "stop": ["so on!"]}
    text = server.shared_http.post(path, json=fields).text
    chunks = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
    streamed = [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]]
    assert streamed[:-1] == server.engine.answer_ids
    holders = chunks if path == CHAT else [chunk["choices"][0] for chunk in chunks]
    assert ["prompt_token_ids" in holder for holder in holders] == [True] + [False] * (len(chunks) - 1)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": HI, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": HI, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [99999999]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {}, "tokens"),
        (RENDER, {"messages": []}, "messages"),
        (RENDER, {"messages": HI, "chat_template_kwargs": {"mood": "x" * 20_000}}, "chat_template_kwargs"),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
        (CHAT, {"messages": HI, "chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ],
)
def test_what_is_wrong_is_named(server: RunningServer, path: str, fields: dict[str, object], param: str) -> None:
    response = server.shared_http.post(path, json={"model": MODEL_NAME, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("num_tokens", [10, INLINE_CHARS + 1])
def test_many_tokens_are_looked_at_off_the_event_loop(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    threads: set[int] = set()

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def note_and_call(*arguments: Any, **named: Any) -> Any:
            threads.add(threading.get_ident())
            return call(*arguments, **named)

        return note_and_call

    monkeypatch.setattr(TextCodec, "token_text", noted(TextCodec.token_text))
    monkeypatch.setattr("server.openai.tokens.route.check_token_ids", noted(check_token_ids))
    post(server, "/tokenize", prompt="x" * num_tokens, return_token_strs=True)
    post(server, "/detokenize", tokens=[5] * num_tokens)
    assert (server.in_loop(threading.get_ident) in threads) == (num_tokens <= INLINE_CHARS)


def test_an_unknown_model_has_no_tokens(server: RunningServer) -> None:
    fields = {"model": "other", "prompt": "a"}
    assert server.shared_http.post("/tokenize", json=fields).status_code == 404
    assert server.shared_http.post("/detokenize", json={"model": "other", "tokens": [1]}).status_code == 404


def test_answers_are_the_same_with_and_without_token_ids(server: RunningServer) -> None:
    assert post(server, CHAT, messages=HI, return_token_ids=True)["choices"][0]["message"]["content"] == ANSWER
