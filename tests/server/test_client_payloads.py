"""Every request of payloads/ is answered, reaches the engine with its right values, and reads as its client expects."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from cllm_core.request import SamplingParams
from cllm_core.text.grammar_compiler import GrammarCompiler
from server.settings import ServerSettings
from tests.server.client_payloads import Payload, read_payloads
from tests.server.fakes import ScriptedEngine, make_info
from tests.server.harness import RunningServer, running
from tests.server.read_answers import Answer, read_answer

INFO = make_info(max_model_len=16384)
TOOLS_BEGIN, TOOLS_END = "each described as JSON:\n", "\n\n"

PAYLOADS = [
    pytest.param(
        payload,
        id=name,
        marks=pytest.mark.xfail(reason=payload.xfail, strict=True, raises=AssertionError) if payload.xfail else (),
    )
    for name, payload in read_payloads().items()
]

every_payload = pytest.mark.parametrize("payload", PAYLOADS)


@pytest.fixture(scope="module")
def tiny() -> Iterator[RunningServer]:
    """Says what a test has it say."""
    with running(ScriptedEngine(info=INFO), served_model_names=["tiny"]) as server:
        yield server


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(INFO.tokenizer.tokenizer_json, INFO.vocab_size, INFO.eos_token_ids)


@every_payload
def test_a_clients_request_is_answered_as_it_expects(
    tiny: RunningServer, compiler: GrammarCompiler, payload: Payload
) -> None:
    answer = post(tiny, payload)
    if payload.status != 200:
        return
    check_prompt(tiny, payload)
    check_params(tiny, payload)
    check_grammar(tiny, payload, compiler)
    assert answer == Answer(payload.text, payload.calls, payload.finish_reason)


def post(server: RunningServer, payload: Payload) -> Answer | None:
    """What the client reads, None of an error."""
    server.engine.say(payload.says)
    body = payload.body
    if payload.before is not None:
        before = server.shared_http.post(payload.path, json=payload.before)
        assert before.status_code == 200, before.text
        body = payload.body_after(before.json())
    response = server.shared_http.post(payload.path, json=body, headers=payload.headers)
    assert response.status_code == payload.status, response.text
    assert response.headers.get("x-ignored-fields", "") == ", ".join(payload.ignored)
    return read_answer(response, payload.path) if payload.status == 200 else None


def check_prompt(server: RunningServer, payload: Payload) -> None:
    prompt = server.engine.decode(server.engine.requests[-1].prompt_ids)
    if payload.prompt is not None:
        assert prompt == payload.prompt
    if payload.system is not None:
        assert prompt.startswith(f"<system>{payload.system}")
    if payload.conversation is not None:
        conversation = "".join(f"<{role}>{text}\n" for role, text in payload.conversation)
        assert prompt.endswith(f"{conversation}<assistant>")
        head = prompt.removesuffix(f"{conversation}<assistant>")
        assert head.startswith("<system>") or not head, head
    assert functions_in(prompt) == [functions_of(payload.body)[name] for name in payload.functions]


def functions_in(prompt: str) -> list[Any]:
    """The functions that a model without a format of its own is told of."""
    told = prompt.partition(TOOLS_BEGIN)[2].partition(TOOLS_END)[0]
    return [json.loads(line) for line in told.splitlines()]


def functions_of(body: dict[str, Any]) -> dict[str, Any]:
    """What the model is to be told of each function of the request, by name."""
    functions = [tool.get("function", tool) for tool in body.get("tools") or () if tool["type"] == "function"]
    functions += body.get("functions") or ()
    told = ("name", "description", "parameters")
    return {f["name"]: {key: f[key] for key in told if f.get(key) is not None} for f in functions}


def check_params(server: RunningServer, payload: Payload) -> None:
    request = server.engine.requests[-1]
    given, defaults = as_json(request.params), as_json(SamplingParams())
    del given["grammar"]
    room = INFO.max_model_len - len(request.prompt_ids)
    within_budget = ServerSettings().max_logprob_entries // (1 + (given["logprobs"] or 0))
    if given["max_tokens"] in (room, within_budget):
        given["max_tokens"] = None
    assert {name: value for name, value in given.items() if value != defaults[name]} == payload.params


def as_json(params: SamplingParams) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(params))
    return fields


def check_grammar(server: RunningServer, payload: Payload, compiler: GrammarCompiler) -> None:
    grammar = server.engine.requests[-1].params.grammar
    if grammar is None or not (payload.matches or payload.rejects):
        assert grammar is None
        assert not payload.matches
        assert not payload.rejects
        return
    told = {text: accepts(compiler, grammar, server.engine.encode(text)) for text in payload.matches + payload.rejects}
    assert told == dict.fromkeys(payload.matches, True) | dict.fromkeys(payload.rejects, False)


def accepts(compiler: GrammarCompiler, grammar: str, token_ids: list[int]) -> bool:
    """Whether a model may write these tokens and end."""
    matcher = compiler.matcher(grammar)
    return bool(matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting())
