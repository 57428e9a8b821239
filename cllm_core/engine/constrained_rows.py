"""The rows of a step that follow a grammar: their drafts before the forward pass, their masks behind it.

Sits between the ModelRunner and the Constraints of the requests: one copy of drafts to the host and back, one copy of
masks to the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cllm_core.engine.constraint import Constraint
from cllm_core.engine.plan import PlannedRow
from cllm_core.engine.processors import keep_allowed
from cllm_core.engine.token_buffer import TokenBuffer
from cllm_core.models.transfer import to_device


@dataclass(frozen=True, slots=True)
class ConstrainedRow:
    """A row with its grammar."""

    row: PlannedRow
    constraint: Constraint
    first_index: int  # of its window among the sampled tokens of the step


class ConstrainedRows:
    """One step's rows that have a grammar; at least one.

    Args:
        rows: with num_sampled >= 1.
        buffer: their drafts are read from it, and written back where a grammar knows better.
        device: of the buffer and of the logits.
    """

    def __init__(self, rows: Sequence[ConstrainedRow], buffer: TokenBuffer, device: torch.device) -> None:
        self._rows = rows
        self._device = device
        self._drafts = self._redraft(buffer)

    def mask(self, logits: Tensor) -> Tensor:
        """The step's logits [S, V] with what the grammars refuse at -inf; waits for nothing on the device."""
        num_positions = sum(one.row.num_sampled for one in self._rows)
        masks = np.empty((num_positions, self._rows[0].constraint.num_words), dtype=np.int32)
        positions: list[int] = []
        for one, draft in zip(self._rows, self._drafts, strict=True):
            num_filled = one.constraint.fill_masks(draft, masks[len(positions) :][: one.row.num_sampled])
            positions += range(one.first_index, one.first_index + num_filled)
        # Little-endian words, so that byte v // 8 of a row holds the bit of token v on every machine.
        octets = torch.from_numpy(masks[: len(positions)].astype("<i4", copy=False).view(np.uint8))
        return keep_allowed(
            logits,
            to_device(torch.tensor(positions, dtype=torch.long), self._device),
            to_device(octets, self._device),
        )

    def _redraft(self, buffer: TokenBuffer) -> list[list[int]]:
        """Write what is forced into the drafts; returns them, n - 1 tokens each."""
        places = [(one.row.slot, one.row.last_accepted_position + 1) for one in self._rows]
        slots, text_ends = to_device(torch.tensor(places).T.contiguous(), self._device)
        width = max(one.row.num_sampled for one in self._rows) - 1
        # Behind a shorter window too there is room, and nothing but guesses.
        padded = buffer.drafts(slots, text_ends, width).tolist()
        for draft, one in zip(padded, self._rows, strict=True):
            num_drafted = one.row.num_sampled - 1
            draft[:num_drafted] = one.constraint.redraft(draft[:num_drafted])
        if width:
            buffer.overwrite_drafts(slots, text_ends, to_device(torch.tensor(padded), self._device))
        return [draft[: one.row.num_sampled - 1] for draft, one in zip(padded, self._rows, strict=True)]
