"""The rows of a step that follow a grammar: their drafts before the forward pass, their masks behind it.

Sits between the ModelRunner and the Constraints of the requests: one copy of masks to the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cllm_core.engine.constraint import Constraint
from cllm_core.engine.grammar_masks import ConstrainedWindow, MaskFiller
from cllm_core.engine.plan import PlannedRow
from cllm_core.engine.processors import keep_allowed
from cllm_core.engine.request_text import RequestText
from cllm_core.models.transfer import to_device


@dataclass(frozen=True, slots=True)
class ConstrainedRow:
    """A row with its grammar."""

    row: PlannedRow
    text: RequestText  # its draft is read, and written where the grammar knows better
    constraint: Constraint
    first_index: int  # of its window among the sampled tokens of the step


class ConstrainedRows:
    """One step's rows that have a grammar; at least one.

    Args:
        rows: with num_sampled >= 1, their drafts made.
        filler: computes the masks.
        device: of the logits.
    """

    def __init__(self, rows: Sequence[ConstrainedRow], filler: MaskFiller, device: torch.device) -> None:
        self._rows = rows
        self._filler = filler
        self._device = device
        self._drafts = [_redraft(one) for one in rows]

    def mask(self, logits: Tensor) -> Tensor:
        """The step's logits [S, V] with what the grammars refuse at -inf; waits for nothing on the device."""
        windows, num_masks = [], 0
        for one, draft in zip(self._rows, self._drafts, strict=True):
            windows.append(ConstrainedWindow(one.constraint, draft, num_masks))
            num_masks += one.row.num_sampled
        masks = np.empty((num_masks, self._rows[0].constraint.num_words), dtype=np.int32)
        positions: list[int] = []
        filled: list[int] = []
        for one, window, num_filled in zip(self._rows, windows, self._filler.fill(windows, masks), strict=True):
            positions += range(one.first_index, one.first_index + num_filled)
            filled += range(window.first_mask, window.first_mask + num_filled)
        # Little-endian words, so that byte v // 8 of a row holds the bit of token v on every machine.
        octets = torch.from_numpy(masks[filled].astype("<i4", copy=False).view(np.uint8))
        return keep_allowed(
            logits,
            to_device(torch.tensor(positions, dtype=torch.long), self._device),
            to_device(octets, self._device),
        )


def _redraft(one: ConstrainedRow) -> list[int]:
    """Write what is forced into the draft; returns it, n - 1 tokens."""
    text_end = one.row.last_accepted_position + 1
    draft = one.constraint.redraft(one.text.tokens(text_end, one.row.end_position).tolist())
    one.text.write_draft(text_end, draft)
    return draft
