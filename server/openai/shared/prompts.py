"""Prompts as the model reads them: messages rendered, texts tokenized, off the event loop where they are long."""

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from cllm_core.text.json_text import to_json
from cllm_core.text.provenance import ChatPrompt
from cllm_core.text.tools.functions import Function

from ...http.ignored import ignore_field
from ...served_models import LoadedModel
from ..chat.messages import Message

# Shorter texts take less time to tokenize than a thread takes to start; longer ones would hold up every stream.
INLINE_CHARS = 4096

# Stands behind a text that shall be continued while it is rendered; like no text of a client.
_END_MARK = uuid.uuid4().hex

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """What a chat template made of messages, special tokens spelled out, and its tokens."""

    text: str
    token_ids: list[int]


async def render_messages(
    messages: Sequence[Message],
    model: LoadedModel,
    *,
    functions: Sequence[Function] = (),
    template_kwargs: Mapping[str, object] | None = None,
    reasoning_effort: str | None = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
    continues_last: bool = False,
    param: str = "messages",
) -> RenderedPrompt:
    """The prompt that these messages are to the model; errors name the request field `param`.

    Args:
        functions: that the model may call.
        template_kwargs: variables of the template, as the client gave them.
        reasoning_effort, enable_thinking: become variables of the template where it knows them, unless
            `template_kwargs` sets those.
        continues_last: the prompt ends with the text of the last message, for the model to go on with.

    Raises:
        UnsupportedParameter: the model has no chat template.
        InvalidRequest: the template refuses the messages or template_kwargs, or makes nothing of them.
    """
    template = model.chat_template
    if template is None:
        raise UnsupportedParameter(
            f"{param}: the model {model.name!r} has no chat template; use /v1/completions, or start the server with "
            "--chat-template",
            param=param,
        )
    if any(message.thought for message in messages) and not model.dialect.support.reasoning_fields:
        reason = f"the chat template of {model.name!r} does not look at earlier reasoning"
        ignore_field("reasoning_content", prefix="messages.", reason=reason)
    reasoning_kwargs = template.reasoning_kwargs(effort=reasoning_effort, is_enabled=enable_thinking)
    if not reasoning_kwargs:
        _report_unused(model, reasoning_effort=reasoning_effort, enable_thinking=enable_thinking)

    def render() -> RenderedPrompt:
        turns = [message.to_turn() for message in messages]
        if continues_last:
            turns[-1] = msgspec.structs.replace(turns[-1], content=turns[-1].content + _END_MARK)
        try:
            prompt = model.dialect.render(
                template,
                turns,
                functions,
                add_generation_prompt=add_generation_prompt,
                template_kwargs={**reasoning_kwargs, **(template_kwargs or {})},
            )
        except InvalidRequest as error:
            if error.param == "messages":
                raise InvalidRequest(str(error), param=param) from error
            raise
        if continues_last:
            end = prompt.text.rfind(_END_MARK)
            prompt = ChatPrompt(prompt.text[:end], prompt.client_mask[:end])
        return RenderedPrompt(prompt.text, model.codec.encode_chat(prompt, param=param))

    prompt = await off_loop_if_long(_num_chars(messages, functions), render)
    if not prompt.token_ids:
        raise InvalidRequest(
            f"{param}: the prompt has no tokens; the model needs at least one to start from", param=param
        )
    return prompt


def _report_unused(model: LoadedModel, *, reasoning_effort: str | None, enable_thinking: bool | None) -> None:
    reason = f"the chat template of {model.name!r} has no such switch"
    if reasoning_effort not in (None, "none"):
        ignore_field("reasoning_effort", reason=reason)
    if enable_thinking:
        ignore_field("enable_thinking", reason=reason)


async def encode_text(text: str, model: LoadedModel, *, param: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text (InvalidRequest where it is not valid Unicode)."""
    return await off_loop_if_long(
        len(text), lambda: model.codec.encode(text, add_special_tokens=add_special_tokens, param=param)
    )


def check_token_ids(token_ids: Sequence[int] | Mapping[int, float], model: LoadedModel, *, param: str) -> None:
    """Raise InvalidRequest where an id is not in the vocabulary."""
    size = model.info.vocab_size
    for token_id in token_ids:
        if not 0 <= token_id < size:
            raise InvalidRequest(
                f"{param}: token id {token_id} is not in the vocabulary; ids go from 0 to {size - 1}", param=param
            )


async def off_loop_if_long(num_chars: int, work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread where it handles so much text that streams would notice."""
    return work() if num_chars <= INLINE_CHARS else await asyncio.to_thread(work)


def _num_chars(messages: Sequence[Message], functions: Sequence[Function]) -> int:
    """About as many characters as there are to render."""
    described = sum(len(to_json(function.as_tool())) for function in functions)
    return described + sum(message.num_chars for message in messages)
