"""ModelRunner: computes one plan. The only place that touches the device.

A step's tokens, positions and drafts go to the device in one copy, and what was chosen there comes back in one: the
host counts what is confirmed, since it knows the drafts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cllm_core.engine.constrained_rows import ConstrainedRow, ConstrainedRows
from cllm_core.engine.drafts import Ids
from cllm_core.engine.jacobi import count_matched
from cllm_core.engine.logprobs import pack_logprobs, unpack_logprobs
from cllm_core.engine.plan import PlannedRow, RowResult, StepPlan, StepResult
from cllm_core.engine.request_text import RequestText
from cllm_core.engine.sampling import sample
from cllm_core.engine.sampling_batch import RowSampling, SamplingBatch
from cllm_core.models.paged import RowSpan
from cllm_core.models.transfer import to_device
from cllm_core.request import TokenLogprobs

TextRow = tuple[PlannedRow, RequestText]


class StepModel(Protocol):
    """A model as the runner sees it (PagedModel; scripted in tests)."""

    device: torch.device

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        """See PagedModel.forward."""
        ...


class ModelRunner:
    """Runs plans on a model.

    Args:
        model: computes logits; its KV cache is already allocated.
        max_model_len: longest prompt + output, in tokens.
    """

    def __init__(self, model: StepModel, *, max_model_len: int) -> None:
        self.model = model
        self._device = model.device
        self._max_model_len = max_model_len
        self._texts: dict[int, RequestText] = {}  # by slot

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan: drafts, forward pass, tokens, acceptance."""
        for admission in plan.admissions:
            self._texts[admission.slot] = RequestText(admission, max_model_len=self._max_model_len)
        if not plan.rows:
            return StepResult(rows=())
        rows = [(row, self._texts[row.slot]) for row in plan.rows]
        for row, text in rows:
            if row.num_sampled > 1:
                text.make_draft(row.last_accepted_position + 1, row.num_sampled - 1)
        windows = [(row, text) for row, text in rows if row.num_sampled]
        constrained = _constrained_rows(windows, self._device)  # before the drafts are read: it may write them
        logits = self._forward(rows)
        num_sampled = sum(row.num_sampled for row, _ in windows)
        in_order = iter(self._run_windows(windows, logits[:num_sampled], constrained))
        results = tuple(next(in_order) if row.num_sampled else RowResult() for row in plan.rows)
        if num_sampled < len(logits):
            scores = self._score_prompts(rows, logits[num_sampled:])
            results = tuple(
                replace(result, prompt_logprobs=found) for result, found in zip(results, scores, strict=True)
            )
        return StepResult(rows=results)

    def _forward(self, rows: Sequence[TextRow]) -> Tensor:
        """Logits [S + P, V]: of the S tokens whose prediction is wanted, then of the P prompt tokens to score."""
        spans: list[RowSpan] = []
        sampled: list[Ids] = []
        scored: list[Ids] = []
        first_index = 0
        for row, _ in rows:
            spans.append(RowSpan(first_index, row.num_tokens, row.first_position, row.block_ids, row.adapter_id))
            first_index += row.num_tokens
            sampled.append(np.arange(first_index - row.num_sampled, first_index))
            if row.scored_positions:
                shift = first_index - row.end_position
                scored.append(np.arange(row.scored_positions.start + shift, row.scored_positions.stop + shift))
        tokens = [text.tokens(row.first_position, row.end_position) for row, text in rows]
        positions = [np.arange(row.first_position, row.end_position) for row, _ in rows]
        packed = to_device(np.concatenate([*tokens, *positions, *sampled, *scored]), self._device)
        input_ids, places, wanted = packed.tensor_split([first_index, 2 * first_index])
        return self.model.forward(input_ids, places, spans, wanted)

    def _run_windows(
        self, rows: Sequence[TextRow], logits: Tensor, constrained: ConstrainedRows | None
    ) -> list[RowResult]:
        """Tokens and acceptance of the rows that have a window; logits [S, V]."""
        if not rows:
            return []
        chosen = self._sample(logits if constrained is None else constrained.mask(logits), rows)
        columns = [chosen[:, None]]
        num_top = _num_top_logprobs(rows)
        if num_top is not None:
            # For all rows, asked or not: the copy stays one rectangle, and few steps have such rows.
            columns.append(pack_logprobs(logits, chosen, num_top))
        host = torch.cat(columns, dim=1).cpu().numpy()
        ends = np.cumsum([row.num_sampled for row, _ in rows])
        return [
            _read_row(row, text, host[end - row.num_sampled : end]) for (row, text), end in zip(rows, ends, strict=True)
        ]

    def _sample(self, logits: Tensor, rows: Sequence[TextRow]) -> Tensor:
        """Choose a token for each sampled position; [S] int64."""
        batch = SamplingBatch.build([_row_sampling(row, text) for row, text in rows], self._device)
        history = None
        if batch.needs_history:
            texts = [rows[index][1].tokens(0, batch.history_length) for index in batch.history_rows]
            history = to_device(np.stack(texts), self._device)
        return sample(logits, batch, history)

    def _score_prompts(self, rows: Sequence[TextRow], logits: Tensor) -> list[tuple[TokenLogprobs, ...]]:
        """Log-probabilities of the prompt tokens behind each row's scored positions; logits [P, V]."""
        spans = [(text, row.scored_positions) for row, text in rows]
        next_ids = np.concatenate([text.tokens(span.start + 1, span.stop + 1) for text, span in spans])
        wanted = [text.admission.request.params.prompt_logprobs for _, text in rows]
        num_top = max(count for count in wanted if count is not None)
        packed = pack_logprobs(logits, to_device(next_ids, self._device), num_top).cpu().numpy()
        parts = np.split(packed, np.cumsum([len(span) for _, span in spans])[:-1])
        return [unpack_logprobs(part, count or 0) for part, count in zip(parts, wanted, strict=True)]


def _constrained_rows(rows: Sequence[TextRow], device: torch.device) -> ConstrainedRows | None:
    """The windows that have to match a grammar, None where there are none."""
    found: list[ConstrainedRow] = []
    first_index = 0
    for row, text in rows:
        if text.admission.constraint is not None:
            found.append(ConstrainedRow(row, text, text.admission.constraint, first_index))
        first_index += row.num_sampled
    return ConstrainedRows(found, device) if found else None


def _row_sampling(row: PlannedRow, text: RequestText) -> RowSampling:
    admission = text.admission
    return RowSampling(
        params=admission.request.params,
        named=text.named,
        seed=admission.seed,
        choice_index=admission.request.choice_index,
        num_positions=row.num_sampled,
        first_output_position=row.last_accepted_position + 1 - len(admission.request.prompt_ids),
        num_prompt_tokens=len(admission.request.prompt_ids),
    )


def _num_top_logprobs(rows: Sequence[TextRow]) -> int | None:
    """The most alternatives any row wants to know the log-probability of; None where none wants any."""
    wanted = (text.admission.request.params.logprobs for _, text in rows)
    return max((count for count in wanted if count is not None), default=None)


def _read_row(row: PlannedRow, text: RequestText, values: np.ndarray) -> RowResult:
    """Accept what a window brought; values [n, 1 or more]: predictions and, where asked, log-probabilities."""
    start = row.last_accepted_position
    window_ids = tuple(text.tokens(start, row.end_position).tolist())
    predicted_ids = tuple(values[:, 0].tolist())
    num_accepted = count_matched(window_ids, predicted_ids) + 1
    text.write_draft(start + 1, predicted_ids)
    num_top = text.admission.request.params.logprobs
    return RowResult(
        window_ids=window_ids,
        predicted_ids=predicted_ids,
        num_accepted=num_accepted,
        logprobs=None if num_top is None else unpack_logprobs(values[:num_accepted, 1:], num_top),
    )
