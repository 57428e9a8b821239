"""The answer's body, whole or one chunk of a stream."""

from typing import Literal

from pydantic import BaseModel

from ..shared.prompt_logprobs import PromptLogprobs
from ..shared.usage import Usage


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a choice, one entry per token in each list; null for a token that follows nothing.

    Attributes:
        top_logprobs: of the likeliest tokens, and of the token itself where it is not among them.
        text_offset: of each token, in characters from the start of the choice's text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One output, whole or (in a stream) what is new of it.

    Attributes:
        draft: in a stream, text that may follow what was given so far, replacing the draft before (extension, on
            request).
        token_ids: of the output, its end-of-sequence token included (extension, on request).
        prompt_token_ids: the same of the prompt; in a stream with the choice's first chunk.
        prompt_logprobs: of the prompt's tokens (extension, on request).
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    draft: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    """Answer to a completion request, whole or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
