"""From a request body to what the engine is asked: prompts rendered, tokenized, checked against the model's limits."""

from collections.abc import Sequence

import msgspec

from cllm_core.errors import InvalidRequest, PromptTooLong
from cllm_core.request import NewRequest, SamplingParams
from server.generation.generation import GenerationPlan
from server.generation.grammar_checker import GrammarChecker
from server.generation.served_models import LoadedModel
from server.openai.chat.body import ChatCompletionRequest, content_text
from server.openai.completions.body import DEFAULT_MAX_TOKENS, CompletionRequest
from server.openai.completions.infill import infill_prompt
from server.openai.shared.fields import GenerationRequest
from server.openai.shared.prompts import RenderedPrompt, check_token_ids, encode_text, off_loop_if_long, render_messages
from server.openai.shared.structured import OutputForm
from server.openai.shared.tools import ToolUse


async def plan_completion(
    body: CompletionRequest, model: LoadedModel, *, answer_id: str, max_choices: int, grammars: GrammarChecker
) -> GenerationPlan:
    """Requests for the choices of a completion call.

    Args:
        answer_id: unique; the engine's request ids are made from it.
        max_choices: most outputs of one call.
        grammars: checks what the output has to match.

    Raises:
        RequestError: a value is out of range, a prompt does not fit the context, or nothing matches the output's form.
        EngineBusy: grammars of others are being checked.
    """
    prompts = body.prompts
    _check_num_choices(len(prompts) * body.num_candidates, max_choices)
    num_chars = _num_chars(prompts) + len(prompts) * len(body.suffix or "")
    prompt_ids = await off_loop_if_long(
        num_chars, lambda: [_checked_prompt_ids(prompt, body, model) for prompt in prompts]
    )
    is_ranked = body.num_candidates > body.num_choices
    logprobs = body.logprobs if body.logprobs is not None or not is_ranked else 0
    grammar = await _grammar(body.output_form(), model, grammars)
    requests: list[NewRequest] = []
    for ids in prompt_ids:
        max_tokens = _completion_limit(body, ids, model)
        params = body.sampling_params(
            max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=logprobs if body.scores_prompt else None
        )
        params = msgspec.structs.replace(params, grammar=grammar)
        _check_params(params, model)
        requests += _choices(body, ids, params, model, answer_id=answer_id, first_index=len(requests))
    return GenerationPlan(
        requests=tuple(requests),
        echoes=_echoes(body, prompt_ids, model),
        continues_text=True,
        num_best=body.num_choices if is_ranked else None,
        shows_token_ids=bool(body.return_token_ids),
    )


async def plan_chat(
    body: ChatCompletionRequest, model: LoadedModel, *, answer_id: str, max_choices: int, grammars: GrammarChecker
) -> GenerationPlan:
    """Requests for the choices of a chat call; arguments and errors as in plan_completion."""
    _check_num_choices(body.num_choices, max_choices)
    num_chars = sum(len(content_text(message.content)) for message in body.messages)
    _check_length(num_chars, model, field=body.prompt_field)
    prompt = await render_chat(body, model)
    prompt_ids = prompt.token_ids
    _check_context(
        len(prompt_ids), body.output_limit, model, prompt_field=body.prompt_field, limit_field=body.limit_field
    )
    params = body.sampling_params(max_tokens=body.output_limit, logprobs=body.num_alternatives)
    use = body.tool_use()
    grammar = await _chat_grammar(body, use, model, grammars)
    params = msgspec.structs.replace(params, grammar=grammar)
    _check_params(params, model)
    prediction_ids = await _prediction_ids(body, model)
    requests = _choices(body, prompt_ids, params, model, answer_id=answer_id, prediction_ids=prediction_ids)
    return GenerationPlan(
        requests=tuple(requests),
        echoes=("",) * len(requests),
        continues_text=False,
        calls=None if use is None else model.dialect.syntax(use.rules.functions, is_required=use.rules.is_required),
        shows_token_ids=bool(body.return_token_ids),
    )


async def render_chat(body: ChatCompletionRequest, model: LoadedModel) -> RenderedPrompt:
    """The prompt of a chat call; errors as render_messages."""
    use = body.tool_use()
    return await render_messages(
        body.messages,
        model,
        functions=() if use is None else use.functions,
        template_kwargs=body.chat_template_kwargs,
        param=body.prompt_field,
    )


async def _grammar(form: OutputForm | None, model: LoadedModel, grammars: GrammarChecker) -> str | None:
    return None if form is None else await grammars.check(form, model)


async def _chat_grammar(
    body: ChatCompletionRequest, use: ToolUse | None, model: LoadedModel, grammars: GrammarChecker
) -> str | None:
    """What the output has to match: the form demanded of text, calls of functions, or one or the other."""
    form = body.output_form()
    if use is None:
        return await _grammar(form, model, grammars)
    rules, dialect = use.rules, model.dialect
    calls = await grammars.check(OutputForm("tools", lambda: dialect.grammar(rules), is_quick=True), model)
    if form is None:
        return calls

    def write() -> str:
        return dialect.grammar(msgspec.structs.replace(rules, content=form.write()))

    # The calls have passed alone: what is refused now is the form's fault.
    return await grammars.check(OutputForm(form.param, write, is_quick=form.is_quick), model)


def _choices(
    body: GenerationRequest,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    model: LoadedModel,
    *,
    answer_id: str,
    first_index: int = 0,
    prediction_ids: Sequence[int] = (),
) -> list[NewRequest]:
    return [
        NewRequest(
            request_id=f"{answer_id}-{first_index + choice}",
            prompt_ids=tuple(prompt_ids),
            params=params,
            choice_index=choice,
            prediction_ids=tuple(prediction_ids),
            cache_salt=body.cache_salt or "",
            wants_draft=body.wants_draft,
            adapter=model.adapter_name,
        )
        for choice in range(body.num_candidates)
    ]


def _checked_prompt_ids(prompt: str | list[int], body: CompletionRequest, model: LoadedModel) -> list[int]:
    """Tokens of a prompt; PromptTooLong, before the next prompt costs any time, where they do not fit."""
    if isinstance(prompt, str):
        _check_length(len(prompt) + len(body.suffix or ""), model, field="prompt")
    ids = _prompt_ids(prompt, body.suffix, model)
    _check_context(len(ids), body.max_tokens, model, prompt_field="prompt", limit_field="max_tokens")
    return ids


def _prompt_ids(prompt: str | list[int], suffix: str | None, model: LoadedModel) -> list[int]:
    if isinstance(prompt, list):
        check_token_ids(prompt, model, param="prompt")
        return prompt
    text = infill_prompt(prompt, suffix, model.codec) if suffix else prompt
    ids = model.codec.encode(text, add_special_tokens=True, param="prompt")
    if not ids:
        raise InvalidRequest("prompt: holds no tokens; the model needs at least one to start from", param="prompt")
    return ids


async def _prediction_ids(body: ChatCompletionRequest, model: LoadedModel) -> list[int]:
    if body.prediction is None:
        return []
    text = content_text(body.prediction.content)
    _check_length(len(text), model, field="prediction")
    ids = await encode_text(text, model, param="prediction", add_special_tokens=False)
    if len(ids) > model.info.max_model_len:
        raise InvalidRequest(
            f"prediction: has {len(ids)} tokens, but no answer of this model is longer than "
            f"{model.info.max_model_len}: shorten it",
            param="prediction",
        )
    return ids


def _completion_limit(body: CompletionRequest, prompt_ids: Sequence[int], model: LoadedModel) -> int:
    if body.max_tokens is not None:
        return body.max_tokens
    return min(DEFAULT_MAX_TOKENS, model.info.max_model_len - len(prompt_ids))


def _check_length(num_chars: int, model: LoadedModel, *, field: str) -> None:
    """Refuse a text that is too long however it is cut into tokens: encoding megabytes takes seconds."""
    limit = model.info.max_model_len
    most = limit * model.codec.max_token_chars
    if num_chars > most:
        raise PromptTooLong(
            f"This model's maximum context length is {limit} tokens, which hold at most {most} characters, but "
            f"{field} has {num_chars}: shorten it",
            param=field,
        )


def _check_context(
    num_prompt: int, max_tokens: int | None, model: LoadedModel, *, prompt_field: str, limit_field: str
) -> None:
    """Refuse here what the engine could only refuse after queueing it."""
    limit = model.info.max_model_len
    wish = 1 if max_tokens is None else max_tokens
    if num_prompt + wish <= limit:
        return
    field = prompt_field if num_prompt >= limit else limit_field
    raise PromptTooLong(
        f"This model's maximum context length is {limit} tokens, but {num_prompt + wish} were requested "
        f"({num_prompt} in {prompt_field}, {wish} in the completion): shorten {prompt_field} or lower {limit_field}",
        param=field,
    )


def _check_params(params: SamplingParams, model: LoadedModel) -> None:
    check_token_ids(params.logit_bias, model, param="logit_bias")
    check_token_ids(params.stop_token_ids, model, param="stop_token_ids")


def _check_num_choices(num_choices: int, max_choices: int) -> None:
    if num_choices > max_choices:
        raise InvalidRequest(
            f"n: {num_choices} outputs asked for (prompts times n or best_of); this server allows {max_choices} a "
            "request",
            param="n",
        )


def _echoes(body: CompletionRequest, prompt_ids: list[list[int]], model: LoadedModel) -> tuple[str, ...]:
    if not body.echo:
        return ("",) * (len(prompt_ids) * body.num_candidates)
    texts = [
        prompt if isinstance(prompt, str) else model.codec.decode(ids)
        for prompt, ids in zip(body.prompts, prompt_ids, strict=True)
    ]
    return tuple(text for text in texts for _ in range(body.num_candidates))


def _num_chars(prompts: list[str] | list[list[int]]) -> int:
    return sum(len(prompt) for prompt in prompts)
