"""Log-probabilities of answers: how many one request may ask for, and shaping many of them beside the event loop.

An entry is one token with its log-probability, chosen or an alternative. In an answer it takes about 600 bytes and some
microseconds.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from cllm_core.errors import InvalidRequest
from cllm_core.request import NewRequest

from ...generation.choices import ChoiceDelta, ChoiceResult

T = TypeVar("T")

# Shaped at once; more would be felt by the streams that wait meanwhile.
_INLINE_ENTRIES = 1000


def within_budget(requests: Sequence[NewRequest], max_entries: int, *, limit_is_given: bool) -> list[NewRequest]:
    """The requests of one call, whose outputs are cut to what the budget holds where the client set no limit itself.

    Args:
        requests: of the call.
        max_entries: the budget.
        limit_is_given: whether the client said how long an output may get.

    Raises:
        InvalidRequest: prompt and outputs as they were asked for do not fit the budget.
    """
    num_per_token = sum(_num_entries(request.params.logprobs) for request in requests)
    num_of_prompts = sum(_num_entries(r.params.prompt_logprobs) * len(r.prompt_ids) for r in requests)
    if num_of_prompts > max_entries:
        raise InvalidRequest(
            f"prompt_logprobs: {num_of_prompts} log-probabilities of the prompt were requested; {_remedy(max_entries)}",
            param="prompt_logprobs",
        )
    if not num_per_token:
        return list(requests)
    most = (max_entries - num_of_prompts) // num_per_token
    longest = max((r.params.max_tokens for r in requests if r.params.max_tokens is not None), default=None)
    if most < 1 or (limit_is_given and longest is not None and longest > most):
        raise InvalidRequest(
            f"logprobs: {num_per_token} log-probabilities for each of up to {longest} tokens were requested (outputs "
            f"times alternatives and the token itself); {_remedy(max_entries)}",
            param="logprobs",
        )
    return [_cut(request, most) for request in requests]


async def off_loop_if_many(parts: Iterable[ChoiceDelta | ChoiceResult], work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread where the parts that it shapes have many log-probabilities."""
    num_entries = sum(_num_shaped(part) for part in parts)
    return work() if num_entries <= _INLINE_ENTRIES else await asyncio.to_thread(work)


def _num_entries(num_alternatives: int | None) -> int:
    return 0 if num_alternatives is None else num_alternatives + 1


def _cut(request: NewRequest, most: int) -> NewRequest:
    limit = request.params.max_tokens
    if limit is not None and limit <= most:
        return request
    return msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, max_tokens=most))


def _num_shaped(part: ChoiceDelta | ChoiceResult) -> int:
    entries = [entry.logprobs for entry in part.logprobs]
    if part.scored_prompt is not None:
        entries += part.scored_prompt.logprobs
    return sum(1 + len(entry.top_ids) for entry in entries)


def _remedy(max_entries: int) -> str:
    return f"this server allows {max_entries} a request (--max-logprob-entries): ask for fewer"
