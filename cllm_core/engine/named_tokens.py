"""NamedTokens: the tokens that a request's settings name, as arrays. Made once per request; steps only repeat them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cllm_core.engine.ids import Ids
from cllm_core.request import SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class NamedTokens:
    """Of one request.

    Attributes:
        bias_ids, bias_values: [B] int64 and [B] float32, logit_bias.
        stop_ids: [S] int64, all tokens that end the output, end-of-sequence included unless ignored.
        max_bias_id, max_stop_id: the largest of each, -1 where there are none.
    """

    bias_ids: Ids
    bias_values: NDArray[np.float32]
    stop_ids: Ids
    max_bias_id: int
    max_stop_id: int

    @classmethod
    def of(cls, params: SamplingParams, stop_token_ids: Sequence[int] = ()) -> Self:
        """From what a request asks for, and the tokens that end it."""
        return cls(
            bias_ids=np.array(list(params.logit_bias), dtype=np.int64),
            bias_values=np.array(list(params.logit_bias.values()), dtype=np.float32),
            stop_ids=np.array(stop_token_ids, dtype=np.int64),
            max_bias_id=max(params.logit_bias, default=-1),
            max_stop_id=max(stop_token_ids, default=-1),
        )
