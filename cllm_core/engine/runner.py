"""ModelRunner: computes one plan. The only place that touches the device.

Everything stays batched over the rows of the step; the host hears of it through one small copy at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cllm_core.engine.constrained_rows import ConstrainedRow, ConstrainedRows
from cllm_core.engine.jacobi import count_matched
from cllm_core.engine.logprobs import pack_logprobs, unpack_logprobs
from cllm_core.engine.plan import Admission, PlannedRow, RowResult, StepPlan, StepResult
from cllm_core.engine.sampling import sample
from cllm_core.engine.sampling_batch import RowSampling, SamplingBatch
from cllm_core.engine.token_buffer import TokenBuffer
from cllm_core.models.paged import RowSpan
from cllm_core.models.transfer import to_device
from cllm_core.request import TokenLogprobs


class StepModel(Protocol):
    """A model as the runner sees it (PagedModel; scripted in tests)."""

    device: torch.device

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        """See PagedModel.forward."""
        ...


@dataclass(frozen=True, slots=True)
class Windows:
    """The Jacobi windows of a step: B rows padded to N tokens. Tensors are int64 on the device."""

    rows: tuple[PlannedRow, ...]
    slots: Tensor  # [B]
    last_positions: Tensor  # [B] position of the window's first token
    lengths: Tensor  # [B] window length n
    flat_index: Tensor  # [B, N] into the S sampled tokens; padding repeats the row's last

    @property
    def width(self) -> int:
        """N, the longest window."""
        return self.flat_index.shape[1]


class ModelRunner:
    """Runs plans on a model.

    Args:
        model: computes logits; its KV cache is already allocated.
        max_num_seqs: slots.
        max_model_len: longest prompt + output, in tokens.
    """

    def __init__(self, model: StepModel, *, max_num_seqs: int, max_model_len: int) -> None:
        self.model = model
        self._device = model.device
        self._buffer = TokenBuffer(max_num_seqs, max_model_len, model.device)
        self._admitted: dict[int, Admission] = {}  # by slot

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan: forward pass, tokens, acceptance, next drafts."""
        self._admitted |= {admission.slot: admission for admission in plan.admissions}
        self._buffer.admit(plan.admissions)
        if not plan.rows:
            return StepResult(rows=())
        constrained = self._constrained_rows(plan.rows)  # before the drafts are read: it may write them
        slots, positions, sampled = self._to_device(_flatten(plan.rows))
        input_ids = self._buffer.gather(slots, positions)
        scored = self._scored(plan.rows)
        wanted = sampled if scored is None else torch.cat([sampled, scored])
        logits = self.model.forward(input_ids, positions, _spans(plan.rows), wanted)
        windows = iter(self._run_windows(plan.rows, logits[: len(sampled)], input_ids[sampled], constrained))
        results = tuple(next(windows) if row.num_sampled else RowResult() for row in plan.rows)
        if scored is not None:
            next_ids = self._buffer.gather(slots[scored], positions[scored] + 1)
            scores = self._score_prompts(plan.rows, logits[len(sampled) :], next_ids)
            pairs = zip(results, scores, strict=True)
            results = tuple(replace(result, prompt_logprobs=found) for result, found in pairs)
        return StepResult(rows=results)

    def _run_windows(
        self, rows: Sequence[PlannedRow], logits: Tensor, input_ids: Tensor, constrained: ConstrainedRows | None
    ) -> list[RowResult]:
        """Tokens, acceptance and next drafts of the rows that have a window; logits [S, V], input_ids [S]."""
        rows = tuple(row for row in rows if row.num_sampled)
        if not rows:
            return []
        windows = self._windows(rows)
        chosen = self._sample(logits if constrained is None else constrained.mask(logits), windows)
        window_ids = input_ids[windows.flat_index]
        predicted = chosen[windows.flat_index]
        matched = count_matched(window_ids, predicted, windows.lengths)
        self._advance(windows, predicted, matched)
        columns = [matched[:, None], window_ids, predicted]
        num_top = self._num_top_logprobs(rows)
        if num_top is not None:
            # For all rows, asked or not: the copy stays one rectangle, and few steps have such rows.
            columns.append(pack_logprobs(logits, chosen, num_top)[windows.flat_index].flatten(1))
        host = torch.cat(columns, dim=1).cpu().numpy()
        return [self._read_row(row, values, windows.width) for row, values in zip(rows, host, strict=True)]

    def _constrained_rows(self, rows: Sequence[PlannedRow]) -> ConstrainedRows | None:
        """The windows that have to match a grammar, None where there are none."""
        found: list[ConstrainedRow] = []
        first_index = 0
        for row in rows:
            constraint = self._admitted[row.slot].constraint
            if constraint is not None and row.num_sampled:
                found.append(ConstrainedRow(row, constraint, first_index))
            first_index += row.num_sampled
        return ConstrainedRows(found, self._buffer, self._device) if found else None

    def _to_device(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """Copy int64 arrays to the device in one transfer."""
        packed = to_device(np.concatenate(arrays), self._device)
        return list(packed.split([len(array) for array in arrays]))

    def _windows(self, rows: tuple[PlannedRow, ...]) -> Windows:
        lengths = np.asarray([row.num_sampled for row in rows])
        starts = np.cumsum(lengths) - lengths
        offsets = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        slots, last_positions, device_lengths, flat_index = self._to_device(
            [
                np.asarray([row.slot for row in rows]),
                np.asarray([row.last_accepted_position for row in rows]),
                lengths,
                (starts[:, None] + offsets).ravel(),
            ]
        )
        return Windows(rows, slots, last_positions, device_lengths, flat_index.view(len(rows), -1))

    def _sample(self, logits: Tensor, windows: Windows) -> Tensor:
        """Choose a token for each sampled position; [S] int64."""
        batch = SamplingBatch.build([self._row_sampling(row) for row in windows.rows], self._device)
        history = None
        if batch.needs_history:
            (slots,) = self._to_device([np.asarray([windows.rows[index].slot for index in batch.history_rows])])
            history = self._buffer.texts(slots, batch.history_length)
        return sample(logits, batch, history)

    def _row_sampling(self, row: PlannedRow) -> RowSampling:
        admission = self._admitted[row.slot]
        return RowSampling(
            params=admission.request.params,
            seed=admission.seed,
            choice_index=admission.request.choice_index,
            num_positions=row.num_sampled,
            first_output_position=row.last_accepted_position + 1 - len(admission.request.prompt_ids),
            num_prompt_tokens=len(admission.request.prompt_ids),
            # Masks know which tokens end an output, and when none but these are left.
            stop_token_ids=admission.stop_token_ids if admission.constraint is None else (),
        )

    def _advance(self, windows: Windows, predicted: Tensor, matched: Tensor) -> None:
        self._buffer.advance(
            windows.slots,
            windows.last_positions,
            windows.lengths,
            predicted,
            matched,
            longest=max(row.end_position for row in windows.rows),
            block_length=max(self._admitted[row.slot].block_length for row in windows.rows),
            has_prediction=any(self._admitted[row.slot].request.prediction_ids for row in windows.rows),
        )

    def _num_top_logprobs(self, rows: Sequence[PlannedRow]) -> int | None:
        """The most alternatives any row wants to know the log-probability of; None where none wants any."""
        wanted = (self._admitted[row.slot].request.params.logprobs for row in rows)
        return max((count for count in wanted if count is not None), default=None)

    def _scored(self, rows: Sequence[PlannedRow]) -> Tensor | None:
        """Flat indices [P] of the tokens whose successors in the prompt are scored, None where there are none."""
        if not any(row.scored_positions for row in rows):
            return None
        shifts = np.cumsum([row.num_tokens for row in rows]) - [row.end_position for row in rows]
        spans = [row.scored_positions for row in rows]
        places = [np.arange(span.start, span.stop) + shift for span, shift in zip(spans, shifts, strict=True)]
        (scored,) = self._to_device([np.concatenate(places)])
        return scored

    def _score_prompts(
        self, rows: Sequence[PlannedRow], logits: Tensor, next_ids: Tensor
    ) -> list[tuple[TokenLogprobs, ...]]:
        """Log-probabilities of the prompt tokens behind each row's scored positions; logits [P, V], next_ids [P]."""
        wanted = [self._admitted[row.slot].request.params.prompt_logprobs for row in rows]
        num_top = max(count for count in wanted if count is not None)
        packed = pack_logprobs(logits, next_ids, num_top).cpu().numpy()
        parts = np.split(packed, np.cumsum([len(row.scored_positions) for row in rows])[:-1])
        return [unpack_logprobs(part, count or 0) for part, count in zip(parts, wanted, strict=True)]

    def _read_row(self, row: PlannedRow, values: np.ndarray, width: int) -> RowResult:
        """A row of the host's copy: matched, N window tokens, N predictions and, where asked, log-probabilities."""
        num_accepted = int(values[0]) + 1
        window_ids, predicted_ids = values[1 : 1 + width], values[1 + width : 1 + 2 * width]
        num_top = self._admitted[row.slot].request.params.logprobs
        logprobs = None
        if num_top is not None:
            logprobs = unpack_logprobs(values[1 + 2 * width :].reshape(width, -1)[:num_accepted], num_top)
        return RowResult(
            window_ids=tuple(window_ids[: row.num_sampled].tolist()),
            predicted_ids=tuple(predicted_ids[: row.num_sampled].tolist()),
            num_accepted=num_accepted,
            logprobs=logprobs,
        )


def _flatten(rows: Sequence[PlannedRow]) -> list[np.ndarray]:
    """Slots [T], positions [T], and flat indices of the sampled tokens [S] of a step, int64."""
    ends = np.cumsum([row.num_tokens for row in rows])
    return [
        np.repeat([row.slot for row in rows], [row.num_tokens for row in rows]),
        np.concatenate([np.arange(row.first_position, row.end_position) for row in rows]),
        np.concatenate([np.arange(end - row.num_sampled, end) for row, end in zip(rows, ends, strict=True)]),
    ]


def _spans(rows: Sequence[PlannedRow]) -> list[RowSpan]:
    spans = []
    first_index = 0
    for row in rows:
        spans.append(RowSpan(first_index, row.num_tokens, row.first_position, row.block_ids, row.adapter_id))
        first_index += row.num_tokens
    return spans
