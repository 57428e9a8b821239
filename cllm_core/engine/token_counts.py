"""TokenCounts: how often each token stands in the text of a request that has penalties. Kept current, never recounted.

Host only. A step costs as much as the text has different tokens, not as much as it is long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cllm_core.engine.ids import Ids

Counts = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class WindowCounts:
    """What the n positions of a window count: the text up to and including the token whose successor each predicts.

    Attributes:
        token_ids: [E] int64, each once; tokens that are not among them have not occurred.
        text: [n, E] float32, how often in prompt, accepted output and draft; of the prompt whether, not how often.
        output: [n, E] float32, the same without the prompt.
    """

    token_ids: Ids
    text: Counts
    output: Counts


class TokenCounts:
    """Of one request.

    Args:
        prompt_ids: tokens of the prompt that count; none where the request has no penalty on them.
    """

    def __init__(self, prompt_ids: Sequence[int] = ()) -> None:
        self._token_ids: Ids = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._in_prompt: Counts = np.ones(len(self._token_ids), dtype=np.float32)
        self._output: Counts = np.zeros(len(self._token_ids), dtype=np.float32)
        self._index = {token_id: index for index, token_id in enumerate(self._token_ids.tolist())}

    def add(self, token_ids: Sequence[int]) -> None:
        """Count tokens that were accepted."""
        indices = self._indices(token_ids)
        self._token_ids, self._in_prompt, self._output = self._extended()
        np.add.at(self._output, indices, 1)

    def of_window(self, draft_ids: Sequence[int]) -> WindowCounts:
        """Counts behind the accepted text and behind each of the n - 1 draft tokens."""
        num_known = len(self._token_ids)
        indices = self._indices(draft_ids)
        token_ids, in_prompt, counts = self._extended()
        output = np.tile(counts, (len(indices) + 1, 1))
        for depth, index in enumerate(indices, start=1):
            output[depth:, index] += 1
        for token_id in token_ids[num_known:].tolist():  # a draft is forgotten
            del self._index[token_id]
        return WindowCounts(token_ids, output + in_prompt, output)

    def _indices(self, token_ids: Sequence[int]) -> list[int]:
        """Where the tokens stand in the arrays; new ones get the places behind."""
        return [self._index.setdefault(token_id, len(self._index)) for token_id in token_ids]

    def _extended(self) -> tuple[Ids, Counts, Counts]:
        """The arrays with a place for each token of the index."""
        num_new = len(self._index) - len(self._token_ids)
        if not num_new:
            return self._token_ids, self._in_prompt, self._output
        new_ids = np.fromiter(islice(self._index, len(self._token_ids), None), dtype=np.int64, count=num_new)
        return (
            np.append(self._token_ids, new_ids),
            np.pad(self._in_prompt, (0, num_new)),
            np.pad(self._output, (0, num_new)),
        )
