"""Where the work on prompts is done."""

import asyncio
import threading

import pytest
from starlette.requests import Request

from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.codec import TextCodec
from cllm_core.text.dialect import find_dialect
from cllm_core.text.provenance import ChatPrompt
from server.openai.chat.plan import plan_chat
from server.openai.chat.request import ChatCompletionRequest
from server.openai.completions.plan import plan_completion
from server.openai.completions.request import CompletionRequest
from server.openai.shared.call import Call
from server.openai.shared.prompts import INLINE_CHARS
from server.served_models import LoadedModel, TextTools
from server.services import build_services
from server.settings import ServerSettings
from tests.server.fakes import ScriptedEngine, make_info


class RecordingCodec(TextCodec):
    """Remembers the threads in which texts were encoded."""

    def __init__(self) -> None:
        super().__init__(make_info().tokenizer)
        self.threads: list[int] = []

    def encode(self, text: str, *, add_special_tokens: bool, param: str | None = None) -> list[int]:
        self.threads.append(threading.get_ident())
        return super().encode(text, add_special_tokens=add_special_tokens, param=param)

    def encode_chat(self, prompt: ChatPrompt, *, param: str | None = None) -> list[int]:
        self.threads.append(threading.get_ident())
        return super().encode_chat(prompt, param=param)


def make_model(codec: TextCodec, template: ChatTemplate | None = None) -> LoadedModel:
    info = make_info(max_model_len=100_000)
    dialect = find_dialect(template, codec, end_ids=info.eos_token_ids)
    tools = TextTools(info.tokenizer, codec, template, dialect)
    return LoadedModel(name="m", info=info, tools=tools, fingerprint="fp", created=0)


def make_call(model: LoadedModel) -> Call:
    request = Request({"type": "http", "headers": []})
    return Call(request, build_services(ScriptedEngine(), ServerSettings()), model, id="a", created=0)


@pytest.mark.parametrize(("num_chars", "on_loop"), [(10, True), (INLINE_CHARS + 1, False)])
def test_long_prompts_are_tokenized_off_the_event_loop(num_chars: int, on_loop: bool) -> None:
    codec = RecordingCodec()
    body = CompletionRequest.model_validate({"model": "m", "prompt": "x" * num_chars})
    planning = plan_completion(body, make_call(make_model(codec)))
    plan = asyncio.run(planning)
    assert [thread == threading.get_ident() for thread in codec.threads] == [on_loop]
    assert len(plan.requests[0].prompt_ids) == num_chars


def test_a_long_prediction_is_tokenized_off_the_event_loop_too() -> None:
    codec = RecordingCodec()
    model = make_model(codec, ChatTemplate("Hello"))
    prediction = {"type": "content", "content": "x" * (INLINE_CHARS + 1)}
    fields = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "prediction": prediction}
    body = ChatCompletionRequest.model_validate(fields)
    asyncio.run(plan_chat(body, make_call(model)))
    assert [thread == threading.get_ident() for thread in codec.threads] == [True, False]
