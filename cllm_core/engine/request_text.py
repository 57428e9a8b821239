"""RequestText: on the host, what a running request has said - prompt, accepted output, then the current draft.

Predictions are written to the positions that they predict, so accepting tokens and shifting the draft need no move (see
`jacobi`); where another source of drafts was right further lately, its draft is written over them (see `drafters`).
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from cllm_core.config import MAX_BLOCK_LENGTH
from cllm_core.engine.ids import Ids
from cllm_core.engine.named_tokens import NamedTokens
from cllm_core.engine.plan import Admission
from cllm_core.engine.token_counts import TokenCounts, WindowCounts
from cllm_core.request import SamplingParams


class RequestText:
    """Text and drafts of one request, and what it was admitted with.

    Args:
        admission: brings prompt, accepted output, and what the client expects as output.
        max_model_len: longest prompt + output, in tokens.

    Attributes:
        admission: as given.
        named: tokens that the request's settings name, for choosing tokens.
        prediction: [P] what the client expects as output; empty where it says nothing.
        proposal_params: by which gated rows choose what they propose: those of the request, but for penalties, which
            would need counts of texts that may never be.
    """

    def __init__(self, admission: Admission, *, max_model_len: int) -> None:
        self.admission = admission
        # Masks know which tokens end an output, and when none but these are left.
        stop_token_ids = admission.stop_token_ids if admission.constraint is None else ()
        self.named = NamedTokens.of(admission.request.params, stop_token_ids)
        self.proposal_params = without_penalties(admission.request.params)
        self._num_prompt = len(admission.request.prompt_ids)
        self.prediction: Ids = np.asarray(admission.request.prediction_ids[:max_model_len], dtype=np.int64)
        # With capacity for a draft behind a full context.
        self._tokens = np.zeros(max_model_len + MAX_BLOCK_LENGTH, dtype=np.int64)
        num_tokens = len(admission.token_ids)
        self._tokens[:num_tokens] = admission.token_ids
        self._draft_end = num_tokens  # up to where there are predictions
        params = admission.request.params
        self._counts: TokenCounts | None = None
        if params.has_penalties:
            self._counts = TokenCounts(admission.request.prompt_ids if params.penalizes_repetition else ())
        self._num_counted = self._num_prompt
        if num_tokens == self._num_prompt:
            # While nothing is decoded no n-gram could find the prediction's beginning.
            self.write_draft(num_tokens, self.prediction[: admission.block_length - 1])

    def tokens(self, first: int, end: int) -> Ids:
        """[end - first] tokens from a position on, accepted or draft; a view."""
        return self._tokens[first:end]

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return self._num_prompt

    def predicted(self, text_end: int, num_tokens: int) -> Ids:
        """Up to so many tokens that are predicted or drafted behind the first `text_end` tokens; a view."""
        return self._tokens[text_end : min(self._draft_end, text_end + num_tokens)]

    def window_counts(self, text_end: int, num_drafted: int) -> WindowCounts | None:
        """What the positions of a window count for penalties, None where the request has none.

        Args:
            text_end: tokens accepted, never fewer than before.
            num_drafted: draft tokens of the window behind them.
        """
        if self._counts is None:
            return None
        self._counts.add(self._tokens[self._num_counted : text_end].tolist())
        self._num_counted = text_end
        return self._counts.of_window(self._tokens[text_end : text_end + num_drafted].tolist())

    def put_draft(self, text_end: int, draft_ids: Ids) -> None:
        """Put another source's draft behind the first `text_end` tokens; it counts as predicted only where it was."""
        self._tokens[text_end : text_end + len(draft_ids)] = draft_ids

    def write_draft(self, text_end: int, draft_ids: Sequence[int] | Ids) -> None:
        """Put this draft, or what the model predicts, behind the first `text_end` tokens."""
        draft_end = text_end + len(draft_ids)
        self._tokens[text_end:draft_end] = draft_ids
        self._draft_end = max(self._draft_end, draft_end)


def without_penalties(params: SamplingParams) -> SamplingParams:
    """The same, but for what depends on the tokens before."""
    if not params.has_penalties:
        return params
    return msgspec.structs.replace(params, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0)
