"""From a completion request to what the engine is asked."""

import msgspec

from cllm_core.errors import InvalidRequest
from cllm_core.request import NewRequest

from ...generation.plan import GenerationPlan
from ...served_models import LoadedModel
from ..shared.call import Call
from ..shared.logprobs import within_budget
from ..shared.planning import (
    check_length,
    check_num_choices,
    check_params,
    fit_limit,
    grammar_of,
    requests_of,
)
from ..shared.prompts import check_token_ids, off_loop_if_long
from .infill import infill_prompt
from .request import CompletionRequest


async def plan_completion(body: CompletionRequest, call: Call) -> GenerationPlan:
    """Requests for the choices of a completion call.

    Raises:
        RequestError: a value is out of range, a prompt does not fit the context, or nothing matches the output's form.
        EngineBusy: grammars of others are being checked.
    """
    model, prompts = call.model, body.prompts
    check_num_choices(len(prompts) * body.num_candidates, call.services.settings.max_choices)
    num_chars = _num_chars(prompts) + len(prompts) * len(body.suffix or "")
    prompt_ids = await off_loop_if_long(
        num_chars, lambda: [_checked_prompt_ids(prompt, body, call) for prompt in prompts]
    )
    is_ranked = body.num_candidates > body.num_choices
    logprobs = body.logprobs if body.logprobs is not None or not is_ranked else 0
    grammar = await grammar_of(body.output_form(), model, call.services.grammars)
    requests: list[NewRequest] = []
    for ids in prompt_ids:
        max_tokens = fit_limit(len(ids), body.output_limit, call, prompt_field="prompt")
        params = body.sampling_params(
            defaults=model.info.sampling_defaults,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=logprobs if body.scores_prompt else body.prompt_logprobs,
        )
        params = msgspec.structs.replace(params, grammar=grammar)
        check_params(params, model)
        requests += requests_of(body, ids, params, model, answer_id=call.id, first_index=len(requests))
    requests = within_budget(
        requests, call.services.settings.max_logprob_entries, limit_is_given=body.output_limit is not None
    )
    return GenerationPlan(
        requests=tuple(requests),
        echoes=_echoes(body, prompt_ids, model),
        continues_text=True,
        scores_echo=body.scores_prompt,
        num_best=body.num_choices if is_ranked else None,
        shows_token_ids=bool(body.return_token_ids),
    )


def _checked_prompt_ids(prompt: str | list[int], body: CompletionRequest, call: Call) -> list[int]:
    """Tokens of a prompt; PromptTooLong, before the next prompt costs any time, where they do not fit."""
    if isinstance(prompt, str):
        check_length(len(prompt) + len(body.suffix or ""), call.model, field="prompt")
    ids = _prompt_ids(prompt, body.suffix, call.model)
    fit_limit(len(ids), body.output_limit, call, prompt_field="prompt")
    return ids


def _prompt_ids(prompt: str | list[int], suffix: str | None, model: LoadedModel) -> list[int]:
    if isinstance(prompt, list):
        check_token_ids(prompt, model, param="prompt")
        return prompt
    text = infill_prompt(prompt, suffix, model.codec) if suffix else prompt
    ids = model.codec.encode(text, add_special_tokens=True, param="prompt")
    if not ids:
        raise InvalidRequest("prompt: has no tokens; the model needs at least one to start from", param="prompt")
    return ids


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
