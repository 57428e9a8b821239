"""What is fuzzed, and the law of each: a function of bytes that raises where it does not hold.

`make fuzz` lets atheris look for bytes that break one, guided by the code that they reach; test_targets.py runs them on
a few random bytes.
"""

import math
from collections.abc import Callable, Sequence

import msgspec
from pydantic import ValidationError

from cllm_core.errors import EngineFailed, InvalidRequest, RequestError
from cllm_core.info import EngineStats
from cllm_core.request import DecodingStats, NewRequest, RequestOutput, SamplingParams
from cllm_core.text.stream import OutputText
from cllm_core.text.tools.functions import FunctionCall
from cllm_core.text.tools.reader import CallReader, join_calls
from cllm_core.worker import transport
from cllm_core.worker.messages import Abort, FromWorker, Loading, StepReport, Submit, ToWorker
from server.http.body_limits import check_containers
from server.http.ignored import IgnoredFields, collect_ignored
from server.http.json_body import parse_json, refuse_repeated_names
from server.openai.chat.request import ChatCompletionRequest
from server.openai.completions.request import CompletionRequest
from server.openai.responses.request import ResponseRequest
from server.settings import ServerSettings
from tests.text import factories
from tests.text.tool_functions import FUNCTIONS, SEQUENTIAL

_LIMITS = ServerSettings().body_limits
_BODIES = (ChatCompletionRequest, CompletionRequest, ResponseRequest)
_CODEC = factories.make_codec(factories.byte_level())
_NUM_TOKENS = 265
_DECODERS = (msgspec.msgpack.Decoder(ToWorker), msgspec.msgpack.Decoder(FromWorker))


def request_body(data: bytes) -> None:
    """A body is refused in words or becomes a request; nothing else escapes."""
    if not data:
        return
    model, body = _BODIES[data[0] % len(_BODIES)], data[1:]
    try:
        check_containers(body)
        value = parse_json(body)
        _LIMITS.check(value)
        refuse_repeated_names(body)
        with collect_ignored(IgnoredFields()):
            model.model_validate(value)
    except (RequestError, ValidationError):
        return


def tool_calls(data: bytes) -> None:
    """Calls and content are the same however the text is cut; damaged ones end in EngineFailed, however it is cut."""
    if len(data) < 2:
        return
    tool_format = SEQUENTIAL[data[0] % len(SEQUENTIAL)]
    text, step = data[2:].decode("utf-8", "replace"), data[1] % 7 + 1

    def read(pieces: Sequence[str]) -> object:
        reader = CallReader(tool_format, FUNCTIONS)
        try:
            parts = [reader.push(piece) for piece in pieces]
            return "".join(part.content for part in parts) + reader.flush(), join_calls(
                [c for p in parts for c in p.calls]
            )
        except EngineFailed:
            return None

    assert read([text]) == read([text[i : i + step] for i in range(0, len(text), step)])


def output_text(data: bytes) -> None:
    """Text, stop strings and tokens of an output are the same however many tokens a step brings."""
    if len(data) < 2:
        return
    step, num_stop = data[0] % 5 + 1, data[1] % 4
    stop = tuple(filter(None, data[2 : 2 + num_stop].decode("utf-8", "ignore")))
    ids = tuple(byte % _NUM_TOKENS for byte in data[2 + num_stop :])

    def read(size: int) -> object:
        text = OutputText(_CODEC, stop=stop)
        pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
        deltas = [text.push(_output(piece)) for piece in pieces]
        deltas.append(text.push(_output((), is_last=True)))
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        return "".join(delta.text for delta in deltas), token_ids, text.matched_stop

    assert read(1) == read(step)


def detokenizer(data: bytes) -> None:
    """All bytes of a text are in it, or a mark for those that are no character; cutting changes nothing."""
    ids = [byte % _NUM_TOKENS for byte in data]
    whole, piecewise = OutputText(_CODEC, stop=()), OutputText(_CODEC, stop=())
    together = whole.push(_output(tuple(ids))).text + whole.push(_output((), is_last=True)).text
    apart = "".join(piecewise.push(_output((token_id,))).text for token_id in ids)
    assert together == apart + piecewise.push(_output((), is_last=True)).text
    assert together.encode("utf-8", "strict").decode() == together


def wire_messages(data: bytes) -> None:
    """Bytes are a message, or unreadable; a message can be written and read again."""
    for decoder in _DECODERS:
        try:
            message = decoder.decode(data)
        except transport._UNREADABLE:
            continue
        except InvalidRequest:  # a request whose values are out of range
            continue
        again = decoder.decode(msgspec.msgpack.encode(message))
        assert again == message or _has_nan(message)


def _has_nan(message: object) -> bool:
    """Whether numbers in it differ from themselves."""
    return any(isinstance(value, float) and math.isnan(value) for value in _leaves(msgspec.to_builtins(message)))


def _leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for pair in value.items() for part in pair for leaf in _leaves(part)]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _output(token_ids: tuple[int, ...], *, is_last: bool = False) -> RequestOutput:
    stats = DecodingStats(num_prompt_tokens=1)
    if is_last:
        return RequestOutput(request_id="a", token_ids=token_ids, finish_reason="length", stats=stats)
    return RequestOutput(request_id="a", token_ids=token_ids, stats=stats)


def seeds() -> dict[str, list[bytes]]:
    """Bytes to begin with, by target: sound ones, so that what lies behind the first checks is reached."""
    chat = b'\x00{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "tools": '
    chat += b'[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], '
    chat += b'"tool_choice": "auto", "logprobs": true,'
    chat += b' "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}, "stop": ["b"]}'
    completion = b'\x01{"prompt": [1, 2], "n": 2, "logit_bias": {"5": 1}, "stream": true, "echo": true}'
    response = b'\x02{"input": [{"type": "message", "role": "user", "content": "a"}, {"type": "function_call_output",'
    response += b' "call_id": "c", "output": "d"}], "text": {"format": {"type": "json_object"}}, "include": []}'
    calls = [FunctionCall("get", '{"tags": [1, "}"]}'), FunctionCall("a-1", "{}")]
    written = [bytes([number, 2]) + form.write(calls).encode() for number, form in enumerate(SEQUENTIAL)]
    request = NewRequest(request_id="a", prompt_ids=(1, 2), params=SamplingParams(stop=("b",), logit_bias={3: 1.0}))
    output = _output((1, 2), is_last=True)
    messages = [
        Submit(request),
        Abort(("a",)),
        StepReport((output,), (EngineStats(accepted_per_row=(1,)),)),
        Loading("a", 0.5),
    ]
    return {
        "request_body": [chat, completion, response],
        "tool_calls": written,
        "output_text": [b"\x01\x02loHello world", b"\x02\x00\xc3\xa9\xf0\x9f\x91\x8d"],
        "detokenizer": [b"\xc3\xa9\xf0\x9f\x91\x8d", bytes(range(200))],
        "wire_messages": [msgspec.msgpack.encode(message) for message in messages],
    }


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (request_body, tool_calls, output_text, detokenizer, wire_messages)
}
