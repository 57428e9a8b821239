"""What the plans of all endpoints share: requests to the engine, and checks against the model's limits."""

from collections.abc import Sequence

from cllm_core.errors import InvalidRequest, PromptTooLong
from cllm_core.request import NewRequest, SamplingParams

from ...generation.grammar_checker import GrammarChecker, OutputForm
from ...served_models import LoadedModel
from .call import Call
from .prompts import check_token_ids
from .sampling import GenerationRequest


async def grammar_of(form: OutputForm | None, model: LoadedModel, grammars: GrammarChecker) -> str | None:
    """The grammar of a form, None for none; errors as GrammarChecker.check."""
    return None if form is None else await grammars.check(form, model)


def requests_of(
    body: GenerationRequest,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    model: LoadedModel,
    *,
    answer_id: str,
    first_index: int = 0,
    prediction_ids: Sequence[int] = (),
) -> list[NewRequest]:
    """One request for each output of a prompt; their ids are made from answer_id."""
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


def check_length(num_chars: int, model: LoadedModel, *, field: str) -> None:
    """Refuse a text that is too long however it is cut into tokens: encoding megabytes takes seconds."""
    limit = model.info.max_model_len
    most = limit * model.codec.max_token_chars
    if num_chars > most:
        raise PromptTooLong(
            f"{field}: has {num_chars} characters, but this model's context of {limit} tokens holds at most {most}: "
            "shorten it",
            param=field,
        )


def fit_limit(num_prompt: int, wanted: int | None, call: Call, *, prompt_field: str) -> int | None:
    """Output limit in tokens: as requested, cut to the context left behind the prompt and to the server's own limit.

    None runs to the end of the context.

    Raises:
        PromptTooLong: the prompt fills the context.
    """
    context = call.model.info.max_model_len
    num_left = context - num_prompt
    if num_left < (0 if wanted == 0 else 1):
        raise PromptTooLong(
            f"{prompt_field}: has {num_prompt} tokens, which leaves no room for an answer within this model's context "
            f"of {context} tokens: shorten it",
            param=prompt_field,
        )
    limits = [limit for limit in (wanted, call.services.settings.max_output_tokens) if limit is not None]
    return min(*limits, num_left) if limits else None


def check_params(params: SamplingParams, model: LoadedModel) -> None:
    """Raise InvalidRequest where a token id is not in the vocabulary."""
    check_token_ids(params.logit_bias, model, param="logit_bias")
    check_token_ids(params.stop_token_ids, model, param="stop_token_ids")


def check_num_choices(num_choices: int, max_choices: int) -> None:
    """Raise InvalidRequest where more outputs are wanted than one call may have."""
    if num_choices > max_choices:
        raise InvalidRequest(
            f"n: {num_choices} outputs were requested (prompts times n or best_of); this server allows {max_choices} a "
            "request: lower n or send fewer prompts",
            param="n",
        )
