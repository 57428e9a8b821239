"""Prompts as the model reads them: messages rendered, texts tokenized, off the event loop where they are long."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cllm_core.errors import InvalidRequest, UnsupportedParameter
from cllm_core.text.chat_template import ChatTemplate
from server.models import LoadedModel
from server.schemas.chat import Message, content_text

# Shorter texts take less time to tokenize than a thread takes to start; longer ones would hold up every stream.
INLINE_CHARS = 4096

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
    template_kwargs: Mapping[str, object] | None = None,
    add_generation_prompt: bool = True,
    param: str = "messages",
) -> RenderedPrompt:
    """The prompt that these messages are to the model; errors name the request field `param`.

    Raises:
        UnsupportedParameter: the model has no chat template.
        InvalidRequest: the template refuses the messages or template_kwargs, or makes nothing of them.
    """
    template = model.chat_template
    if template is None:
        raise UnsupportedParameter(
            f"{param}: the model {model.name!r} has no chat template; use /v1/completions", param=param
        )

    def render() -> RenderedPrompt:
        text = _rendered(messages, template, template_kwargs, add_generation_prompt=add_generation_prompt)
        return RenderedPrompt(text, model.codec.encode(text, add_special_tokens=False, param=param))

    num_chars = sum(len(content_text(message.content)) for message in messages)
    prompt = await off_loop_if_long(num_chars, render)
    if not prompt.token_ids:
        raise InvalidRequest(f"{param}: no tokens; the model needs at least one to start from", param=param)
    return prompt


async def encode_text(text: str, model: LoadedModel, *, param: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text (InvalidRequest where it is no valid Unicode)."""
    return await off_loop_if_long(
        len(text), lambda: model.codec.encode(text, add_special_tokens=add_special_tokens, param=param)
    )


def check_token_ids(token_ids: Sequence[int] | Mapping[int, float], model: LoadedModel, *, param: str) -> None:
    """Raise InvalidRequest where an id is not in the vocabulary."""
    size = model.info.vocab_size
    for token_id in token_ids:
        if not 0 <= token_id < size:
            raise InvalidRequest(f"{param}: token id {token_id} is not in the vocabulary (0..{size - 1})", param=param)


async def off_loop_if_long(num_chars: int, work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread where it handles so much text that streams would notice."""
    return work() if num_chars <= INLINE_CHARS else await asyncio.to_thread(work)


def _rendered(
    messages: Sequence[Message],
    template: ChatTemplate,
    template_kwargs: Mapping[str, object] | None,
    *,
    add_generation_prompt: bool,
) -> str:
    return template.render(
        [_template_message(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        template_kwargs=template_kwargs,
    )


def _template_message(message: Message) -> dict[str, object]:
    """A message as templates know it: text content, and `system` for the role that OpenAI renamed to `developer`."""
    role = "system" if message.role == "developer" else message.role
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    given = {key: value for key, value in optional.items() if value is not None}
    return {"role": role, "content": content_text(message.content), **given}
