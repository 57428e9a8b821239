"""MaskFiller: the grammar masks of all windows of a step, on several threads. Host only, no torch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens

from cllm_core.engine.constraint import QUICK_SECONDS, Constraint, Masks


@dataclass(frozen=True, slots=True)
class ConstrainedWindow:
    """A window whose predictions have to match a grammar.

    Attributes:
        draft: n - 1 tokens.
        first_mask: index of its first of n masks.
    """

    constraint: Constraint
    draft: Sequence[int]
    first_mask: int


class MaskFiller:
    """Writes the masks of a step's windows, those of quick grammars on several threads at once.

    Args:
        num_threads: to use.
    """

    def __init__(self, num_threads: int) -> None:
        self._executor = LLExecutor(num_threads)

    def fill(self, windows: Sequence[ConstrainedWindow], masks: Masks) -> list[int]:
        """Write masks; returns how many of each window were written, as `Constraint.fill_masks` does.

        Args:
            windows: of one step, apart from each other.
            masks: [positions, num_words].
        """
        quick = [window for window in windows if window.constraint.is_quick and window.constraint.error is None]
        together = dict(zip(map(id, quick), self._fill_together(quick, masks), strict=True)) if len(quick) > 1 else {}
        return [
            together[id(window)] if id(window) in together else window.constraint.fill_masks(window.draft, own)
            for window, own in ((window, masks[window.first_mask :][: len(window.draft) + 1]) for window in windows)
        ]

    def _fill_together(self, windows: Sequence[ConstrainedWindow], masks: Masks) -> list[int]:
        started = time.perf_counter()
        prefixes = [window.constraint.legal_prefix(window.draft) for window in windows]
        jobs = [
            (walker, window.first_mask, text_ids) for window, (walker, text_ids) in zip(windows, prefixes, strict=True)
        ]
        if drafted := [job for job in jobs if job[2]]:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, masks)
        if single := [(walker, first) for walker, first, text_ids in jobs if not text_ids]:
            fill_next_token_bitmask_par(self._executor, single, masks)
        num_masks = sum(len(text_ids) + 1 for _, text_ids in prefixes)
        if time.perf_counter() - started > QUICK_SECONDS * num_masks:
            for window in windows:  # one of them, or the machine, has become slow: their next windows find out which
                window.constraint.is_quick = False
        return [
            window.constraint.take_masks(masks[window.first_mask :][: len(text_ids) + 1], walker)
            for window, (walker, text_ids) in zip(windows, prefixes, strict=True)
        ]
