"""From a chat completion request to what the engine is asked."""

from collections.abc import Sequence

import msgspec

from cllm_core.errors import InvalidRequest
from cllm_core.text.expected_answer import ExpectedAnswer
from cllm_core.text.grammar import has_look_around
from cllm_core.text.tools.functions import Function

from ...generation.grammar_checker import GrammarChecker, OutputForm
from ...generation.plan import GenerationPlan
from ...http.ignored import ignore_field
from ...served_models import LoadedModel
from ..shared.call import Call
from ..shared.logprobs import within_budget
from ..shared.planning import (
    check_length,
    check_num_choices,
    check_params,
    fit_limit,
    requests_of,
)
from ..shared.prompts import RenderedPrompt, encode_text, render_messages
from ..shared.tools import ToolUse
from .request import ChatCompletionRequest


async def plan_chat(body: ChatCompletionRequest, call: Call) -> GenerationPlan:
    """Requests for the choices of a chat call; errors as in plan_completion."""
    model, grammars = call.model, call.services.grammars
    check_num_choices(body.num_choices, call.services.settings.max_choices)
    num_chars = sum(message.num_chars for message in body.messages)
    check_length(num_chars, model, field=body.prompt_field)
    prompt = await render_chat(body, model)
    prompt_ids = prompt.token_ids
    defaults = model.info.sampling_defaults
    wanted = body.output_limit(defaults.max_tokens)
    params = body.sampling_params(
        defaults=defaults,
        max_tokens=fit_limit(len(prompt_ids), wanted, call, prompt_field=body.prompt_field),
        logprobs=body.num_alternatives,
        prompt_logprobs=body.prompt_logprobs,
    )
    use = body.tool_use()
    expected = model.dialect.answer_to(prompt.text, continued=body.continued_text)
    grammar = await _grammar(body, use, expected, model, grammars)
    params = msgspec.structs.replace(params, grammar=grammar)
    check_params(params, model)
    prediction_ids = await _prediction_ids(body, model)
    requests = within_budget(
        requests_of(body, prompt_ids, params, model, answer_id=call.id, prediction_ids=prediction_ids),
        call.services.settings.max_logprob_entries,
        limit_is_given=body.output_limit(None) is not None,
    )
    return GenerationPlan(
        requests=tuple(requests),
        echoes=("",) * len(requests),
        continues_text=bool(body.continue_final_message),
        syntax=expected.syntax() if use is None else use.syntax(expected),
        shows_reasoning=body.include_reasoning is not False,
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
        reasoning_effort=body.reasoning_effort,
        enable_thinking=body.enable_thinking,
        add_generation_prompt=body.opens_answer,
        continues_last=bool(body.continue_final_message),
        param=body.prompt_field,
    )


async def _grammar(
    body: ChatCompletionRequest,
    use: ToolUse | None,
    expected: ExpectedAnswer,
    model: LoadedModel,
    grammars: GrammarChecker,
) -> str | None:
    """What the output has to match: the form demanded of text, calls of functions, or one or the other."""
    form = body.output_form()
    rules = None if use is None else use.rules
    calls = None
    if rules is not None:
        _report_look_around(rules.functions)
        calls = await grammars.check(OutputForm("tools", lambda: expected.grammar(rules, None), is_quick=True), model)
    if form is None:
        return calls
    # The calls have passed alone: what is refused now is the form's fault.
    behind = OutputForm(form.param, lambda: expected.grammar(rules, form.write()), is_quick=form.is_quick)
    return await grammars.check(behind, model)


def _report_look_around(functions: Sequence[Function]) -> None:
    if any(has_look_around(function.parameters or {}) for function in functions if not function.is_strict):
        ignore_field("pattern", prefix="tools.", reason="look-around in patterns cannot be enforced")


async def _prediction_ids(body: ChatCompletionRequest, model: LoadedModel) -> list[int]:
    if body.prediction is None:
        return []
    text = body.prediction.content
    check_length(len(text), model, field="prediction")
    ids = await encode_text(text, model, param="prediction", add_special_tokens=False)
    if len(ids) > model.info.max_model_len:
        raise InvalidRequest(
            f"prediction: has {len(ids)} tokens, but no answer of this model is longer than "
            f"{model.info.max_model_len}: shorten it",
            param="prediction",
        )
    return ids
