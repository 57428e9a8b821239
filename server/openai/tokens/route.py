"""/tokenize, /detokenize and /v1/chat/completions/render: what the model reads, for debugging templates and prompts."""

from fastapi import APIRouter

from ...http.json_body import JsonRoute
from ...http.openapi import errors
from ...served_models import LoadedModel
from ...services import ServicesDep
from ..chat.plan import render_chat
from ..chat.request import ChatCompletionRequest
from ..shared.prompts import check_token_ids, encode_text, off_loop_if_long, render_messages
from .body import (
    DetokenizeRequest,
    DetokenizeResponse,
    RenderResponse,
    TokenizeRequest,
    TokenizeResponse,
)

router = APIRouter(tags=["tokens"], route_class=JsonRoute, responses=errors(400, 404, 413, 415, 503))


@router.post("/tokenize", response_model_exclude_none=True)
async def tokenize(body: TokenizeRequest, services: ServicesDep) -> TokenizeResponse:
    """Tokenize a text or a conversation."""
    model = await services.models.get(body.model)
    ids = await _token_ids(body, model)
    texts = None
    if body.return_token_strs:
        texts = await off_loop_if_long(len(ids), lambda: [model.codec.token_text(token_id) for token_id in ids])
    return TokenizeResponse(count=len(ids), max_model_len=model.info.max_model_len, tokens=ids, token_strs=texts)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, services: ServicesDep) -> DetokenizeResponse:
    """Spell tokens out."""
    model = await services.models.get(body.model)

    def spell() -> str:
        check_token_ids(body.tokens, model, param="tokens")
        return model.codec.spell(body.tokens)

    return DetokenizeResponse(prompt=await off_loop_if_long(len(body.tokens), spell))


@router.post("/v1/chat/completions/render")
async def render_chat_completion(body: ChatCompletionRequest, services: ServicesDep) -> RenderResponse:
    """Show the prompt that a chat completion request leads to, however long, and generate nothing."""
    model = await services.models.get(body.model)
    defaults = model.info.sampling_defaults
    body.sampling_params(defaults=defaults, max_tokens=None, logprobs=None)  # a value out of range is an error here too
    prompt = await render_chat(body, model)
    return RenderResponse(
        prompt=prompt.text,
        count=len(prompt.token_ids),
        max_model_len=model.info.max_model_len,
        token_ids=prompt.token_ids,
    )


async def _token_ids(body: TokenizeRequest, model: LoadedModel) -> list[int]:
    if body.messages is None:
        add_special_tokens = body.add_special_tokens is not False
        return await encode_text(body.prompt or "", model, param="prompt", add_special_tokens=add_special_tokens)
    prompt = await render_messages(
        body.messages,
        model,
        template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    return prompt.token_ids
