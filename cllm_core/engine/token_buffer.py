"""TokenBuffer: on the device, the text of every running request - prompt, accepted output, then the current draft.

Predictions are written to the places they predict, so accepting tokens and shifting the draft need no move (see
`jacobi`). Only this module knows the layout; the runner reads step inputs from it and reports predictions to it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cllm_core.config import MAX_BLOCK_LENGTH
from cllm_core.engine.drafts import MAX_NGRAM, continue_prediction, guess_tail, last_tokens
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
        self._draft_ends = torch.zeros(num_slots, dtype=torch.long, device=device)
        self._prompt_lengths = torch.ones(num_slots, dtype=torch.long, device=device)
        self._block_lengths = torch.ones(num_slots, dtype=torch.long, device=device)
        self._prediction_lengths = torch.zeros(num_slots, dtype=torch.long, device=device)
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
        """Write the texts of requests that got a slot, and guess their first drafts."""
        if not admissions:
            return
        numbers = [(a.slot, len(a.token_ids), len(a.request.prompt_ids), a.block_length) for a in admissions]
        slots, text_ends, prompt_lengths, block_lengths = self._to_device(numbers).T
        texts = self._to_device([a.token_ids for a in admissions])
        self._tokens[slots, : texts.shape[1]] = texts
        self._prompt_lengths[slots] = prompt_lengths
        self._block_lengths[slots] = block_lengths
        self._draft_ends[slots] = text_ends
        self._admit_predictions(admissions, slots)
        longest = max(len(a.token_ids) for a in admissions)
        block_length = max(a.block_length for a in admissions)
        has_prediction = any(a.request.prediction_ids for a in admissions)
        self._extend_drafts(slots, text_ends, longest, block_length, has_prediction=has_prediction)

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
        """Write a step's predictions and guess the tails of the next drafts.

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
        written = last_positions + 1 + lengths
        self._draft_ends[slots] = torch.maximum(self._draft_ends[slots], written)
        text_ends = last_positions + 2 + matched
        if has_prediction:
            self._draft_predictions(slots, text_ends, longest + 1, block_length)
        self._extend_drafts(slots, text_ends, longest + 1, block_length, has_prediction=has_prediction)

    def _admit_predictions(self, admissions: Sequence[Admission], slots: Tensor) -> None:
        predictions = [a.request.prediction_ids[: self._max_model_len] for a in admissions]
        if not any(predictions) and self._predictions is None:
            return
        if self._predictions is None:
            shape = (len(self._tokens), self._max_model_len)
            self._predictions = torch.zeros(shape, dtype=torch.long, device=slots.device)
        padded = self._to_device(predictions)
        self._predictions[slots, : padded.shape[1]] = padded
        self._prediction_lengths[slots] = self._to_device([(len(p),) for p in predictions])[:, 0]
        for admission, prediction in zip(admissions, predictions, strict=True):
            is_fresh = len(admission.token_ids) == len(admission.request.prompt_ids)
            draft = prediction[: admission.block_length - 1]
            if is_fresh and draft:  # nothing is decoded yet, so there is no n-gram that could find its beginning
                start = len(admission.token_ids)
                self._tokens[admission.slot, start : start + len(draft)] = self._to_device([draft])[0]
                self._draft_ends[admission.slot] += len(draft)

    def _draft_predictions(self, slots: Tensor, text_ends: Tensor, longest: int, block_length: int) -> None:
        """Start the draft anew from the client's prediction where the text's last tokens are found in it.

        Behind a wrong token the model's own unconfirmed predictions are guesses from wrong text; this takes the
        prediction up again MAX_NGRAM tokens after an edit.
        """
        assert self._predictions is not None
        text = self._tokens[slots, : longest + 1]
        drafted, inside, num_matched = continue_prediction(
            self._predictions[slots],
            self._prediction_lengths[slots],
            last_tokens(text, text_ends),
            near=text_ends - self._prompt_lengths[slots],
            num_tokens=block_length,
        )
        room = torch.arange(block_length, device=slots.device) < self._block_lengths[slots][:, None] - 1
        inside &= room & (num_matched == MAX_NGRAM)[:, None]
        self._write(slots, text_ends, drafted, inside=inside)
        self._draft_ends[slots] = torch.maximum(self._draft_ends[slots], text_ends + inside.sum(dim=1))

    def _extend_drafts(
        self, slots: Tensor, text_ends: Tensor, longest: int, block_length: int, *, has_prediction: bool
    ) -> None:
        """Guess until each slot's draft has its block length - 1 tokens."""
        if block_length == 1:
            return
        limit = min(longest + block_length + 1, self._scratch)
        draft_ends = self._draft_ends[slots]
        guesses = guess_tail(
            self._tokens[slots, :limit],
            prompt_lengths=self._prompt_lengths[slots],
            text_ends=text_ends,
            draft_ends=draft_ends,
            predictions=self._predictions[slots] if has_prediction and self._predictions is not None else None,
            prediction_lengths=self._prediction_lengths[slots],
            num_guesses=block_length,
        )
        wanted_ends = text_ends + self._block_lengths[slots] - 1
        steps = torch.arange(block_length, device=slots.device)
        self._write(slots, draft_ends, guesses, inside=draft_ends[:, None] + steps < wanted_ends[:, None])
        self._draft_ends[slots] = torch.maximum(draft_ends, wanted_ends)

    def _to_device(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Host values, padded with 0 to the longest row; [len(rows), longest] int64."""
        return to_device(_padded(rows), self._tokens.device)

    def _write(self, slots: Tensor, starts: Tensor, tokens: Tensor, *, inside: Tensor) -> None:
        """Write [B, K] tokens from [B] starts on, where [B, K] `inside` holds."""
        columns = starts[:, None] + torch.arange(tokens.shape[1], device=slots.device)
        self._tokens[slots[:, None], columns.where(inside, self._scratch)] = tokens


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    out = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out
