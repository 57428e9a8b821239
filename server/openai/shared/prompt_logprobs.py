"""`prompt_logprobs` of answers, an extension in vLLM's form: for each prompt token the likeliest ones and itself."""

from pydantic import BaseModel

from cllm_core.request import TokenLogprobs
from cllm_core.text.codec import TextCodec

from ...generation.echo import ScoredPrompt


class PromptTokenLogprob(BaseModel):
    """A token that could stand at a position of the prompt; its rank is null where it is not among the likeliest."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptTokenLogprob] | None]
"""For each token of the prompt by token id; null for the first, which follows nothing."""


def prompt_logprobs(prompt: ScoredPrompt, codec: TextCodec) -> PromptLogprobs:
    """The field of the answer."""
    scored = zip(prompt.token_ids[1:], prompt.logprobs, strict=True)
    return [None, *(_at_position(token_id, entry, codec) for token_id, entry in scored)]


def _at_position(token_id: int, entry: TokenLogprobs, codec: TextCodec) -> dict[int, PromptTokenLogprob]:
    tops = zip(entry.top_ids, entry.top_logprobs, strict=True)
    found = {
        top_id: PromptTokenLogprob(logprob=logprob, rank=rank, decoded_token=codec.token_text(top_id))
        for rank, (top_id, logprob) in enumerate(tops, start=1)
    }
    own = PromptTokenLogprob(logprob=entry.logprob, rank=None, decoded_token=codec.token_text(token_id))
    return {token_id: found.pop(token_id, own), **found}
