"""Reasoning in chat completions: told from answers, streamed, counted, and free of what binds them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cllm_core.request import SamplingDefaults
from cllm_core.text.tools.formats import DEFAULT_FORMAT
from cllm_core.text.tools.functions import FunctionCall
from tests.server.fakes import MODEL_NAME, ScriptedEngine, make_info
from tests.server.harness import RunningServer, running

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
THOUGHT, SAID = "A greeting: say <hello>.", "Hello!"
WRITTEN = f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"
CALL = FunctionCall("get_time", "{}")
TIME = {"type": "function", "function": {"name": "get_time"}}
# Writes earlier reasoning, and ends it in the prompt where a client wants none.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
OPENING = TEMPLATE.removesuffix("{% endif %}") + "<think>{% endif %}"


def make_engine(answer: str, template: str = TEMPLATE, **info: Any) -> ScriptedEngine:
    return ScriptedEngine(answer, info=make_info(max_model_len=4096, chat_template=template, **info))


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(make_engine(WRITTEN)) as running_server:
        yield running_server


def post(server: RunningServer, **fields: object) -> Any:
    response = server.shared_http.post(CHAT, json={"model": MODEL_NAME, "messages": HI, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def stream(server: RunningServer, **fields: object) -> list[Any]:
    body = {"model": MODEL_NAME, "messages": HI, "stream": True, **fields}
    text = server.shared_http.post(CHAT, json=body).text
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]


def joined(chunks: list[Any], field: str) -> str:
    return "".join(choice["delta"].get(field) or "" for chunk in chunks for choice in chunk["choices"])


def num_tokens(server: RunningServer, text: str) -> int:
    return len(server.engine.encode(text))


def test_reasoning_is_a_field_of_its_own_and_counted(server: RunningServer) -> None:
    answer = post(server)
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": SAID, "reasoning_content": THOUGHT, "refusal": None}
    usage = answer["usage"]
    assert usage["completion_tokens"] == num_tokens(server, WRITTEN) + 1  # the end of the text is a token too
    counted = usage["completion_tokens_details"]["reasoning_tokens"]
    assert counted == num_tokens(server, WRITTEN.partition("\n\n")[0])


def test_a_stream_brings_reasoning_before_content_and_never_both_at_once(server: RunningServer) -> None:
    chunks = stream(server, stream_options={"include_usage": True})
    assert (joined(chunks, "reasoning_content"), joined(chunks, "content")) == (THOUGHT, SAID)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    kinds = [[name for name in ("reasoning_content", "content") if delta.get(name)] for delta in deltas]
    assert all(len(kind) < 2 for kind in kinds)
    shown = [kind[0] for kind in kinds if kind]
    assert shown == sorted(shown, reverse=True)
    assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_the_official_client_finds_reasoning_among_the_extra_fields(server: RunningServer) -> None:
    completion = server.openai().chat.completions.create(model=MODEL_NAME, messages=[{"role": "user", "content": "Hi"}])
    assert (completion.choices[0].message.model_extra or {})["reasoning_content"] == THOUGHT


def test_reasoning_may_be_left_out_of_the_answer(server: RunningServer) -> None:
    answer = post(server, include_reasoning=False)
    assert "reasoning_content" not in answer["choices"][0]["message"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    chunks = stream(server, include_reasoning=False)
    assert (joined(chunks, "reasoning_content"), joined(chunks, "content")) == ("", SAID)
    assert all(chunk["choices"][0]["delta"] or chunk["choices"][0]["finish_reason"] for chunk in chunks)


def test_stop_strings_and_logprobs_are_those_of_the_content(server: RunningServer) -> None:
    choice = post(server, stop=["llo"], logprobs=True)["choices"][0]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == (THOUGHT, "He")
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == "He"


def test_an_answer_cut_within_reasoning_has_no_content(server: RunningServer) -> None:
    choice = post(server, max_tokens=num_tokens(server, "<think>\nA greeting"))["choices"][0]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("A greeting", "")
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("fields", [{"enable_thinking": False}, {"reasoning_effort": "none"}])
def test_where_the_prompt_has_ended_reasoning_all_is_content(fields: dict[str, object]) -> None:
    with running(make_engine(SAID)) as server:
        assert post(server, **fields)["choices"][0]["message"]["content"] == SAID
        assert server.engine.decode(server.engine.requests[-1].prompt_ids).endswith("<assistant><think></think>")


def test_where_the_prompt_begins_reasoning_the_answer_goes_on_with_it() -> None:
    with running(make_engine(f"{THOUGHT}</think>{SAID}", OPENING)) as server:
        message = post(server)["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (THOUGHT, SAID)
        grammar = {"structured_outputs": {"choice": ["Hello!"]}}
        assert post(server, **grammar)["choices"][0]["message"]["content"] == SAID
        assert "thought_end" in (server.engine.requests[-1].params.grammar or "")


def test_none_leaves_reasoning_in_the_content() -> None:
    with running(make_engine(WRITTEN), reasoning_format="none") as server:
        message = post(server)["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == (None, WRITTEN)


def test_a_format_may_be_chosen_for_a_template_that_shows_none() -> None:
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with running(make_engine(f"[THINK]{THOUGHT}[/THINK]{SAID}", plain), reasoning_format="mistral") as server:
        message = post(server)["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (THOUGHT, SAID)


def test_calls_come_behind_reasoning() -> None:
    thought = "I could write <tool_call> here."
    with running(make_engine(f"<think>{thought}</think>\n{DEFAULT_FORMAT.write([CALL])}")) as server:
        for choice in ("auto", "required"):
            message = post(server, tools=[TIME], tool_choice=choice)["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == (thought, None)
            assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_time"]
        chunks = stream(server, tools=[TIME])
        assert joined(chunks, "reasoning_content") == thought
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_earlier_reasoning_is_given_to_a_template_that_looks_for_it(server: RunningServer, field: str) -> None:
    post(server, messages=[*HI, {"role": "assistant", "content": "Yes", field: "Hm."}, *HI])
    assert "<assistant><think>Hm.</think>Yes" in server.engine.decode(server.engine.requests[-1].prompt_ids)


def test_a_message_that_is_continued_goes_on_with_the_reasoning_it_holds() -> None:
    with running(make_engine(f"more.</think>{SAID}")) as server:
        messages = [*HI, {"role": "assistant", "content": "<think>Once "}]
        message = post(server, messages=messages, continue_final_message=True)["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("more.", SAID)


DEFAULTS = SamplingDefaults(temperature=0.25, top_k=7, top_p=0.5, min_p=0.1, repetition_penalty=1.5, max_tokens=9)


def test_the_checkpoint_sets_what_a_request_leaves_out() -> None:
    with running(make_engine(SAID, sampling_defaults=DEFAULTS)) as server:
        post(server)
        params = server.engine.requests[-1].params
        assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.25, 7, 0.5, 0.1)
        assert (params.repetition_penalty, params.max_tokens) == (1.5, 9)
        post(server, temperature=1, top_k=-1, top_p=1, min_p=0, repetition_penalty=1.0, max_tokens=-1)
        params = server.engine.requests[-1].params
        assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1, 0, 1, 0)
        assert (params.repetition_penalty, params.max_tokens) == (1.0, None)


def test_it_sets_the_same_for_texts_but_not_their_length() -> None:
    with running(make_engine(SAID, sampling_defaults=DEFAULTS)) as server:
        server.shared_http.post("/v1/completions", json={"model": MODEL_NAME, "prompt": "Hi"})
        params = server.engine.requests[-1].params
        assert (params.temperature, params.top_k, params.max_tokens) == (0.25, 7, 16)
