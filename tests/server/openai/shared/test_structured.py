"""The form demanded of an output reaches the engine as a grammar, in every spelling, and bad ones are refused soon."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from openai import BadRequestError
from openai.types.chat import ChatCompletionMessageParam
from openai.types.shared_params import ResponseFormatJSONSchema
from pydantic import BaseModel

from cllm_core.errors import EngineBusy, InvalidRequest
from cllm_core.text.grammar import choice_grammar, json_grammar, json_object_grammar, regex_grammar, written_grammar
from cllm_core.text.grammar_compiler import GrammarCompiler
from server.generation.grammar_checker import GrammarChecker, OutputForm
from tests.server.fakes import MODEL_NAME, ScriptedEngine
from tests.server.harness import RunningServer, running
from tests.server.openai.shared.test_planning import RecordingCodec, make_model

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
LENIENT = json_grammar(SCHEMA, is_strict=False)
NAMED = {"name": "point", "schema": SCHEMA, "strict": True}


UNIQUE = {"type": "array", "uniqueItems": True}
STRICT = {"name": "x", "schema": UNIQUE, "strict": True}


class Point(BaseModel):
    x: int
    label: str


POINT = Point(x=3, label="très \N{BUTTERFLY}")


@pytest.fixture(scope="module")
def json_server() -> Iterator[RunningServer]:
    """Its engine always answers with a point."""
    with running(ScriptedEngine(POINT.model_dump_json())) as running_server:
        yield running_server


def grammar_of(server: RunningServer, fields: dict[str, object], path: str = "/v1/chat/completions") -> str | None:
    """The grammar that the engine is given for a request with these fields."""
    prompt = {"/v1/completions": {"prompt": "Say:"}, "/v1/responses": {"input": "Hi"}}
    body = {"model": MODEL_NAME, **prompt.get(path, {"messages": HELLO}), **fields}
    response = server.shared_http.post(path, json=body)
    assert response.status_code == 200, response.text
    return server.engine.requests[-1].params.grammar


def refusal(server: RunningServer, fields: dict[str, object], path: str = "/v1/chat/completions") -> dict[str, str]:
    """The error object of a request with these fields, which must cost less than a second of processor time."""
    prompt = {"/v1/completions": {"prompt": "Say:"}, "/v1/responses": {"input": "Hi"}}
    started = time.process_time()  # the server runs in this process; other programs must not fail the test
    response = server.shared_http.post(
        path, json={"model": MODEL_NAME, **prompt.get(path, {"messages": HELLO}), **fields}
    )
    assert time.process_time() - started < 1.0
    assert response.status_code == 400, response.text
    error: dict[str, str] = response.json()["error"]
    return error


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, json_object_grammar()),
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, json_grammar(SCHEMA)),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": False}}}, LENIENT),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, LENIENT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, LENIENT),
        ({"response_format": {"type": "json_schema"}}, json_object_grammar()),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}}, json_object_grammar()),
        ({"guided_json": SCHEMA}, LENIENT),
        ({"guided_json": json.dumps(SCHEMA)}, LENIENT),
        ({"json_schema": SCHEMA}, LENIENT),
        ({"structured_outputs": {"json": SCHEMA}}, LENIENT),
        ({"structured_outputs": {"json_object": True}}, json_object_grammar()),
        ({"guided_regex": "a|b"}, regex_grammar("a|b")),
        ({"structured_outputs": {"regex": "a|b"}}, regex_grammar("a|b")),
        ({"guided_choice": ["yes", "no"]}, choice_grammar(["yes", "no"])),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, choice_grammar(["yes", "no"])),
        ({"guided_grammar": 'start: "a"'}, 'start: "a"'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, 'start: "a"'),
        ({"grammar": 'start: "a"'}, 'start: "a"'),
        ({"grammar": 'root ::= "a"'}, written_grammar('root ::= "a"')),
        ({"guided_choice": [], "structured_outputs": {}, "response_format": {}}, None),
    ],
)
def test_every_spelling_leads_to_its_grammar(
    server: RunningServer, path: str, fields: dict[str, object], grammar: str | None
) -> None:
    assert grammar_of(server, fields, path) == grammar


@pytest.mark.parametrize(
    ("text", "grammar"),
    [
        ({}, None),
        ({"format": {"type": "text"}, "verbosity": "medium"}, None),
        ({"format": {"type": "json_object"}}, json_object_grammar()),
        ({"format": {"type": "json_schema", **NAMED}}, json_grammar(SCHEMA)),
    ],
)
def test_the_text_format_of_responses_leads_to_its_grammar(
    server: RunningServer, text: dict[str, object], grammar: str | None
) -> None:
    assert grammar_of(server, {"text": text}, "/v1/responses") == grammar


def test_every_choice_of_a_call_has_the_grammar(server: RunningServer) -> None:
    grammar_of(server, {"guided_choice": ["yes"], "n": 3})
    assert [request.params.grammar for request in server.engine.requests[-3:]] == [choice_grammar(["yes"])] * 3


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_json": SCHEMA}, "guided_json", "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "set one of json"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json", "must be an object or a string"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_choice": [""]}, "guided_choice", "at least one choice"),
        ({"guided_grammar": "start: b"}, "guided_grammar", "unknown name"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar", "GBNF"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": "[]"}, "guided_json", "object"),
        ({"guided_json": {**UNIQUE, "x-guidance": {"lenient": False}}}, "guided_json", "uniqueItems"),
        ({"response_format": {"type": "json_schema", "json_schema": STRICT}}, "response_format", "uniqueItems"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "no text can match"),
        ({"guided_regex": "a" * 70_000}, "guided_regex", "65536"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos", "grammar"),
    ],
)
def test_bad_forms_are_refused_naming_field_and_reason(
    server: RunningServer, fields: dict[str, object], param: str, reason: str
) -> None:
    error = refusal(server, fields)
    assert error["param"].startswith(param)
    assert reason in error["message"]


def test_bad_formats_of_responses_name_their_own_field(server: RunningServer) -> None:
    text = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}
    error = refusal(server, {"text": text}, "/v1/responses")
    assert (error["param"], "nonsense" in error["message"]) == ("text.format", True)


def test_what_takes_too_long_to_compile_is_refused() -> None:
    with running(ScriptedEngine(), max_grammar_seconds=0.01) as server:
        error = refusal(server, {"guided_regex": "(a{1000}){1000}"})
        assert "takes more than 0.01 s to compile" in error["message"]
        assert error["param"] == "guided_regex"


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_grammar": "start: A\nA: /(.*a){100}/ & /(.*b){100}/ & /(.*c){100}/"},
        {"guided_json": {"allOf": [{"type": "string", "pattern": f"(.*{c}){{10}}"} for c in "abcdefghij"]}},
        {"guided_grammar": "root ::= " + "(" * 5000},
        {"guided_json": "[" * 60_000},
    ],
)
def test_hostile_forms_are_refused_at_little_cost_and_do_no_harm(
    server: RunningServer, fields: dict[str, object]
) -> None:
    refusal(server, fields)
    assert grammar_of(server, {"guided_choice": ["yes"]})


def test_checks_that_take_too_long_are_given_up_and_the_rest_go_on() -> None:
    release = threading.Event()

    def slow() -> str:
        release.wait()
        return "start: /a/"

    async def check_both() -> tuple[BaseException, str]:
        checker, model = GrammarChecker(max_seconds=0.2), make_model(RecordingCodec())
        results = await asyncio.gather(checker.check(OutputForm("slow", slow), model), return_exceptions=True)
        quick = await checker.check(OutputForm("quick", lambda: "start: /b/"), model)
        release.set()
        assert isinstance(results[0], BaseException)
        return results[0], quick

    error, quick = asyncio.run(check_both())
    assert isinstance(error, InvalidRequest)
    assert (error.param, quick) == ("slow", "start: /b/")


def test_a_check_that_finds_no_thread_is_not_the_grammars_fault() -> None:
    release = threading.Event()

    def slow() -> str:
        release.wait()
        return "start: /a/"

    async def check_many() -> list[str | BaseException]:
        checker, model = GrammarChecker(max_seconds=0.05), make_model(RecordingCodec())
        await checker.check(OutputForm("warm_up", lambda: "start: /a/"), model)
        tasks = [checker.check(OutputForm(str(i), slow), model) for i in range(3)]
        results: list[str | BaseException] = await asyncio.gather(*tasks, return_exceptions=True)
        release.set()
        return results

    assert {type(result) for result in asyncio.run(check_many())} == {InvalidRequest, EngineBusy}


class _FullChecker:
    """A checker whose threads are all taken until `release`; its model's vocabulary is laid out."""

    def __init__(self) -> None:
        self.checker = GrammarChecker(max_seconds=0.05)
        self.model = make_model(RecordingCodec())
        self._release = threading.Event()

    def _write_slowly(self) -> str:
        self._release.wait()
        return "start: /a/"

    async def fill(self) -> None:
        checks = [self.checker.check(OutputForm(str(i), self._write_slowly), self.model) for i in range(4)]
        refused = await asyncio.gather(*checks, return_exceptions=True)
        assert all(isinstance(error, InvalidRequest | EngineBusy) for error in refused)

    def release(self) -> None:
        self._release.set()


@pytest.mark.parametrize("is_known", [True, False])
def test_a_grammar_that_passed_lately_needs_no_thread(is_known: bool) -> None:
    async def check_after() -> str:
        full, form = _FullChecker(), OutputForm("form", lambda: "start: /b/", is_quick=True)
        try:
            if is_known:
                await full.checker.check(form, full.model)
            await full.fill()
            return await full.checker.check(form, full.model)
        finally:
            full.release()

    if is_known:
        assert asyncio.run(check_after()) == "start: /b/"
    else:
        with pytest.raises(EngineBusy):
            asyncio.run(check_after())


def test_a_vocabulary_laid_out_first_while_no_thread_is_free_keeps_nobody_waiting() -> None:
    """The layout queued behind checks that may never end."""

    async def check_after() -> None:
        full = _FullChecker()
        try:
            await full.fill()
            info = msgspec.structs.replace(full.model.info, vocab_size=full.model.info.vocab_size + 1)
            other = replace(full.model, info=info)
            check = full.checker.check(OutputForm("late", lambda: "start: /b/"), other)
            await asyncio.wait_for(check, timeout=5)
        finally:
            full.release()

    with pytest.raises(EngineBusy):
        asyncio.run(check_after())


def test_a_vocabulary_is_laid_out_once_however_many_need_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GrammarCompiler] = []

    def make(*arguments: Any) -> GrammarCompiler:
        made.append(GrammarCompiler(*arguments))
        return made[-1]

    async def check_many() -> None:
        checker, model = GrammarChecker(max_seconds=5.0), make_model(RecordingCodec())
        await asyncio.gather(*(checker.check(OutputForm("x", lambda: "start: /a/"), model) for _ in range(8)))

    monkeypatch.setattr("server.generation.grammar_checker.GrammarCompiler", make)
    asyncio.run(check_many())
    assert len(made) == 1


@pytest.mark.parametrize("is_quick", [True, False])
def test_only_what_is_quick_to_write_is_written_in_the_event_loop(is_quick: bool) -> None:
    threads: list[int] = []

    def write() -> str:
        threads.append(threading.get_ident())
        return "start: /a/"

    checker, model = GrammarChecker(max_seconds=5.0), make_model(RecordingCodec())
    asyncio.run(checker.check(OutputForm("form", write, is_quick=is_quick), model))
    assert [thread == threading.get_ident() for thread in threads] == [is_quick]


def test_a_schema_in_text_is_refused_however_deep_it_is(server: RunningServer) -> None:
    """Python's JSON reader goes deeper than its writer, by as much as lies between them on the stack."""
    for depth in range(900, 1000):
        text = '{"a":' * depth + "1" + "}" * depth
        response = server.shared_http.post(
            "/v1/chat/completions", json={"model": MODEL_NAME, "messages": HELLO, "guided_json": text}
        )
        assert (response.status_code, response.json()["error"]["param"]) == (400, "guided_json")


def test_chat_parse_of_the_official_client_gives_the_object(json_server: RunningServer) -> None:
    completion = json_server.openai().chat.completions.parse(model=MODEL_NAME, messages=HELLO, response_format=Point)
    assert completion.choices[0].message.parsed == POINT
    grammar = json_server.engine.requests[-1].params.grammar
    assert grammar is not None
    assert '"label"' in grammar


def test_streamed_chat_parse_gives_the_object(json_server: RunningServer) -> None:
    client = json_server.openai()
    with client.chat.completions.stream(model=MODEL_NAME, messages=HELLO, response_format=Point) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == POINT


def test_responses_parse_of_the_official_client_gives_the_object(json_server: RunningServer) -> None:
    response = json_server.openai().responses.parse(model=MODEL_NAME, input="Hello", text_format=Point)
    assert response.output_parsed == POINT
    grammar = json_server.engine.requests[-1].params.grammar
    assert grammar is not None
    assert '"label"' in grammar


def test_the_official_client_hears_which_part_of_a_schema_is_not_supported(server: RunningServer) -> None:
    unsupported: ResponseFormatJSONSchema = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": UNIQUE, "strict": True},
    }
    with pytest.raises(BadRequestError, match="uniqueItems") as caught:
        server.openai().chat.completions.create(model=MODEL_NAME, messages=HELLO, response_format=unsupported)
    assert caught.value.param == "response_format"
