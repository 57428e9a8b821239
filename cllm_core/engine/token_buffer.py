"""TokenBuffer: on the device, the text of every running request - prompt, accepted output, then the current draft.

Predictions are written to the places they predict, so accepting tokens and shifting the draft need no move (see
`jacobi`); where copied text was right further lately, it is written over them (see `draft_choice`). Only this module
knows the layout; the runner reads step inputs from it and reports predictions to it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cllm_core.config import MAX_BLOCK_LENGTH
from cllm_core.engine.draft_choice import DraftChoice
from cllm_core.engine.drafts import Copies, copy_known
from cllm_core.engine.plan import Admission
from cllm_core.models.transfer import to_device


class TokenBuffer:
    """Tensors with one row per slot.

    Args:
        num_slots: requests that run together.
        max_model_len: longest prompt + output, in tokens.
        device: where the tensors live.
    """

    def __init__(self, num_slots: int, max_model_len: int, device: torch.device) -> None:
        self._max_model_len = max_model_len
        # Room for a draft behind a full context, and one last column where masked writes go.
        width = max_model_len + MAX_BLOCK_LENGTH + 1
        self._scratch = width - 1
        self._tokens = torch.zeros(num_slots, width, dtype=torch.long, device=device)
        self._prompt_lengths = torch.ones(num_slots, dtype=torch.long, device=device)
        self._block_lengths = torch.ones(num_slots, dtype=torch.long, device=device)
        self._prediction_lengths = torch.zeros(num_slots, dtype=torch.long, device=device)
        self._choice = DraftChoice(num_slots, device)
        self._predictions: Tensor | None = None  # [num_slots, max_model_len], made for the first client that has one

    def gather(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Tokens at [T] positions of [T] slots, accepted or draft; [T] int64."""
        return self._tokens[slots, positions]

    def drafts(self, slots: Tensor, text_ends: Tensor, num_tokens: int) -> Tensor:
        """The first draft tokens behind each slot's text of `text_ends` tokens; [B, num_tokens] int64."""
        columns = text_ends[:, None] + torch.arange(num_tokens, device=slots.device)
        return self._tokens[slots[:, None], columns]

    def overwrite_drafts(self, slots: Tensor, text_ends: Tensor, drafts: Tensor) -> None:
        """Inverse of `drafts`."""
        self._write(slots, text_ends, drafts, inside=torch.ones_like(drafts, dtype=torch.bool))

    def texts(self, slots: Tensor, limit: int) -> Tensor:
        """The first `limit` tokens of each slot's text - prompt, accepted output, draft; [B, limit] int64."""
        return self._tokens[slots, :limit]

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Write the texts of requests that got a slot, and their first drafts."""
        if not admissions:
            return
        numbers = [(a.slot, len(a.token_ids), len(a.request.prompt_ids), a.block_length) for a in admissions]
        slots, text_ends, prompt_lengths, block_lengths = self._to_device(numbers).T
        texts = self._to_device([a.token_ids for a in admissions])
        self._tokens[slots, : texts.shape[1]] = texts
        self._prompt_lengths[slots] = prompt_lengths
        self._block_lengths[slots] = block_lengths
        self._choice.forget(slots)
        num_drafted = self._admit_predictions(admissions, slots, text_ends)
        block_length = max(a.block_length for a in admissions)
        if block_length == 1:
            return
        longest = max(len(a.token_ids) for a in admissions)
        has_prediction = any(a.request.prediction_ids for a in admissions)
        copies = self._copy_known(slots, text_ends, longest, block_length - 1, has_prediction=has_prediction)
        drafts = self._own_drafts(slots, text_ends, text_ends + num_drafted, copies)
        self._write_drafts(slots, text_ends, drafts)

    def advance(
        self,
        slots: Tensor,
        last_positions: Tensor,
        lengths: Tensor,
        predicted: Tensor,
        matched: Tensor,
        *,
        longest: int,
        block_length: int,
        has_prediction: bool,
    ) -> None:
        """Write a step's predictions and make the next drafts of them, or of what known text says.

        Args:
            slots: [B] int64.
            last_positions: [B] int64, position of each window's first token.
            lengths: [B] int64 in 1..N, window length of each row.
            predicted: [B, N] int64, predicted[:, i] belongs at last_positions + 1 + i.
            matched: [B] int64, confirmed draft tokens.
            longest: bound of last_positions + lengths, known on the host.
            block_length: bound of the rows' block lengths, known on the host.
            has_prediction: whether a client of these rows gave a prediction.
        """
        steps = torch.arange(predicted.shape[1], device=slots.device)
        self._write(slots, last_positions + 1, predicted, inside=steps < lengths[:, None])
        if block_length == 1:
            return
        self._choice.observe(slots, predicted, matched + 1)
        text_ends = last_positions + 2 + matched
        # Every draft reached to its block length; behind a shorter window the rest of it is still there.
        draft_ends = last_positions + torch.maximum(self._block_lengths[slots], lengths + 1)
        copies = self._copy_known(slots, text_ends, longest + 1, block_length - 1, has_prediction=has_prediction)
        own = self._own_drafts(slots, text_ends, draft_ends, copies)
        drafts = self._choice.choose(slots, own, copies.tokens, is_found=copies.is_found, is_trusted=copies.is_trusted)
        self._write_drafts(slots, text_ends, drafts)

    def _admit_predictions(self, admissions: Sequence[Admission], slots: Tensor, text_ends: Tensor) -> Tensor:
        """Keep the clients' predictions, and open the drafts of fresh requests with them; returns [B] draft tokens."""
        predictions = [a.request.prediction_ids[: self._max_model_len] for a in admissions]
        if not any(predictions) and self._predictions is None:
            return torch.zeros_like(slots)
        if self._predictions is None:
            shape = (len(self._tokens), self._max_model_len)
            self._predictions = torch.zeros(shape, dtype=torch.long, device=slots.device)
        padded = self._to_device(predictions)
        self._predictions[slots, : padded.shape[1]] = padded
        drafts = [_opening(a, prediction) for a, prediction in zip(admissions, predictions, strict=True)]
        lengths = self._to_device([(len(p), len(d)) for p, d in zip(predictions, drafts, strict=True)])
        self._prediction_lengths[slots] = lengths[:, 0]
        opening = self._to_device(drafts)
        inside = torch.arange(opening.shape[1], device=slots.device) < lengths[:, 1, None]
        self._write(slots, text_ends, opening, inside=inside)
        return lengths[:, 1]

    def _copy_known(
        self, slots: Tensor, text_ends: Tensor, longest: int, num_tokens: int, *, has_prediction: bool
    ) -> Copies:
        """Drafts copied from what the slots' texts and clients' predictions say; `longest` bounds text_ends."""
        return copy_known(
            self._tokens[slots, :longest],
            prompt_lengths=self._prompt_lengths[slots],
            text_ends=text_ends,
            predictions=self._predictions[slots] if has_prediction and self._predictions is not None else None,
            prediction_lengths=self._prediction_lengths[slots],
            num_tokens=num_tokens,
        )

    def _own_drafts(self, slots: Tensor, text_ends: Tensor, draft_ends: Tensor, copies: Copies) -> Tensor:
        """What stands behind the texts up to draft_ends, then what the copies say there; [B, K] int64."""
        columns = text_ends[:, None] + torch.arange(copies.tokens.shape[1], device=slots.device)
        return self._tokens[slots[:, None], columns].where(columns < draft_ends[:, None], copies.tokens)

    def _write_drafts(self, slots: Tensor, text_ends: Tensor, drafts: Tensor) -> None:
        """Write [B, K] drafts, of each the block length - 1 tokens that its slot wants."""
        steps = torch.arange(drafts.shape[1], device=slots.device)
        self._write(slots, text_ends, drafts, inside=steps < self._block_lengths[slots][:, None] - 1)

    def _to_device(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Host values, padded with 0 to the longest row; [len(rows), longest] int64."""
        return to_device(_padded(rows), self._tokens.device)

    def _write(self, slots: Tensor, starts: Tensor, tokens: Tensor, *, inside: Tensor) -> None:
        """Write [B, K] tokens from [B] starts on, where [B, K] `inside` holds."""
        columns = starts[:, None] + torch.arange(tokens.shape[1], device=slots.device)
        self._tokens[slots[:, None], columns.where(inside, self._scratch)] = tokens


def _opening(admission: Admission, prediction: tuple[int, ...]) -> tuple[int, ...]:
    """The first draft that a prediction gives: while nothing is decoded no n-gram could find its beginning."""
    is_fresh = len(admission.token_ids) == len(admission.request.prompt_ids)
    return prediction[: admission.block_length - 1] if is_fresh else ()


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    out = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out
