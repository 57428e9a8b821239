"""The usage object: tokens of one API call."""

from typing import Literal

from pydantic import (
    BaseModel,
)


class PromptTokensDetails(BaseModel):
    """What of the prompt tokens is special.

    Attributes:
        cached_tokens: those whose cache entries were shared with an earlier request.
    """

    cached_tokens: int
    audio_tokens: Literal[0]


class CompletionTokensDetails(BaseModel):
    """What of the completion tokens is special; `server.generation.prediction` defines the accepted ones.

    Attributes:
        reasoning_tokens: those that the model thought before it answered, the marks of that included.
        accepted_prediction_tokens: output tokens taken over from the prediction.
        rejected_prediction_tokens: predicted tokens that the output did not take over; no part of completion_tokens.
    """

    reasoning_tokens: int
    audio_tokens: Literal[0]
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class DecodingUsage(BaseModel):
    """How one API call was decoded, over all its choices (extension).

    Attributes:
        forward_passes: Jacobi iterations that yielded output, summed over the choices.
        tokens_per_forward: TPF, tokens that these accepted each; 1.0 is token by token.
        cached_tokens: prompt tokens that were not computed again.
    """

    forward_passes: int
    tokens_per_forward: float
    cached_tokens: int


class Usage(BaseModel):
    """Tokens of one API call, over all its choices; a prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    decoding: DecodingUsage | None = None
