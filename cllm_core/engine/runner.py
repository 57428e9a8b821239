"""ModelRunner: computes one plan. The only place that touches the device.

A step's tokens, positions and drafts go to the device in one copy, and what was chosen there comes back in one: the
host counts what is confirmed, since it knows the drafts. A step is launched first and read later, so that the next one
can be launched in between where its tokens need not pass through the host.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cllm_core.backends.paged_model import SamplingKernels
from cllm_core.engine.constrained_rows import ConstrainedRow, ConstrainedRows
from cllm_core.engine.drafters.base import SeenWindow
from cllm_core.engine.drafters.drafting import Drafting
from cllm_core.engine.grammar_masks import MaskFiller
from cllm_core.engine.ids import Ids
from cllm_core.engine.jacobi import count_matched
from cllm_core.engine.logprobs import pack_logprobs, unpack_logprobs
from cllm_core.engine.plan import GatedBlocks, PlannedRow, RowResult, StepPlan, StepResult
from cllm_core.engine.request_text import RequestText
from cllm_core.engine.sampling import sample
from cllm_core.engine.sampling_batch import RowSampling, SamplingBatch
from cllm_core.models.paged import RowSpan
from cllm_core.models.transfer import HostCopy, to_device
from cllm_core.request import TokenLogprobs

TextRow = tuple[PlannedRow, RequestText]

NOT_FINITE = -1
"""Takes the place of a token whose logit was infinite or not a number."""


class StepModel(Protocol):
    """A model as the runner sees it (PagedModel; scripted in tests)."""

    device: torch.device

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Sequence[RowSpan], sampled: Tensor) -> Tensor:
        """See PagedModel.forward."""
        ...

    def clear_blocks(self, block_ids: Sequence[int]) -> None:
        """See PagedModel.clear_blocks."""
        ...


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that was given to the device, which may be at it still.

    Attributes:
        plan: of the step.
        drafting: made its drafts, and sees what became of them.
        rows: of the plan, with the texts of their requests.
        chosen: [S] int64 on the device, the token behind each position of the windows; None where there are none.
        predictions: [S + G, 1 or more] on the way to the host: these tokens and, where asked, log-probabilities; then
            what the rows of gated blocks propose.
        num_gated: by slot, draft tokens that the gated adapter had proposed.
        scores: log-probabilities of prompt tokens, likewise; None where none are wanted.
        is_awaited: whether the device is done once the step is read; with nothing to read, nobody waits for it.
        has_captured: whether launching it took the time to capture a CUDA graph.
    """

    plan: StepPlan
    drafting: Drafting
    rows: Sequence[TextRow] = ()
    chosen: Tensor | None = None
    predictions: HostCopy | None = None
    scores: HostCopy | None = None
    num_gated: Mapping[int, int] = field(default_factory=dict)
    is_awaited: bool = True
    has_captured: bool = False

    def read(self) -> StepResult:
        """Wait for the step and accept what it brought. Steps are read in the order in which they were launched."""
        in_order = iter(self._read_windows())
        results = tuple(next(in_order) if row.num_sampled else RowResult() for row in self.plan.rows)
        if self.scores is not None:
            scores = _read_scores(self.rows, self.scores)
            results = tuple(
                replace(result, prompt_logprobs=found) for result, found in zip(results, scores, strict=True)
            )
        return StepResult(rows=results)

    def _read_windows(self) -> list[RowResult]:
        """Acceptance of the rows that have a window; the sources of drafts see it."""
        if self.predictions is None:
            return []
        host, rows = self.predictions.wait(), _windows(self.rows)
        ends = np.cumsum([row.num_sampled for row, _ in rows])
        gated_ends = ends[-1] + np.cumsum([row.num_gated_tokens for row, _ in rows])
        return [
            self._read_window(
                row, text, host[end - row.num_sampled : end], host[gated_end - row.num_gated_tokens : gated_end, 0]
            )
            for (row, text), end, gated_end in zip(rows, ends, gated_ends, strict=True)
        ]

    def _read_window(self, row: PlannedRow, text: RequestText, values: np.ndarray, gated_ids: np.ndarray) -> RowResult:
        """Of one row; values [n, 1 or more], gated_ids [rows of its gated blocks]."""
        if NOT_FINITE in values[:, 0] or NOT_FINITE in gated_ids:
            return RowResult(is_finite=False)
        result, text_end = _read_row(row, text, values), row.last_accepted_position + 1
        predicted_ids, num_accepted = result.predicted_ids, result.num_accepted
        self.drafting.observe(
            SeenWindow(row.slot, text, text_end, predicted_ids, num_accepted, row.gated, gated_ids.tolist())
        )
        return replace(
            result,
            num_gated=self.num_gated.get(row.slot, 0),
            num_proposed=self.drafting.num_proposed(row.slot, text_end + num_accepted),
        )


class ModelRunner:
    """Runs plans on a model.

    Args:
        model: computes logits; its KV cache is already allocated.
        max_model_len: longest prompt + output, in tokens.
        drafting: makes the drafts.
        sampling: chooses tokens by the logits; None: tensor code does.
        num_graphs: tells how many CUDA graphs the model has captured so far.
        may_capture: tells whether the next step may capture another.

    Attributes:
        drafting: as given.
    """

    def __init__(
        self,
        model: StepModel,
        *,
        max_model_len: int,
        drafting: Drafting,
        sampling: SamplingKernels | None = None,
        num_graphs: Callable[[], int] = lambda: 0,
        may_capture: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self._device = model.device
        self._max_model_len = max_model_len
        self.sampling = sampling
        self.drafting = drafting
        self._num_graphs = num_graphs
        self.may_capture = may_capture
        self._texts: dict[int, RequestText] = {}  # by slot

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device computes while the host goes on."""
        return self._device.type == "cuda"

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan: drafts, forward pass, tokens, acceptance."""
        return self.launch(plan).read()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, *, behind: LaunchedStep | None = None) -> LaunchedStep:
        """Give a plan to the device, behind what it has.

        Args:
            plan: to compute.
            behind: a step not read yet whose choices are the tokens to compute (Scheduler.schedule_ahead); None where
                the host knows all of them.
        """
        for slot in plan.vacated:
            if self._texts.pop(slot, None) is not None:
                self.drafting.end(slot)
        for admission in plan.admissions:
            text = self._texts[admission.slot] = RequestText(admission, max_model_len=self._max_model_len)
            self.drafting.begin(admission.slot, text)
        if not plan.rows:
            return LaunchedStep(plan, self.drafting)
        rows = [(row, self._texts[row.slot]) for row in plan.rows]
        num_gated = self._write_drafts(rows)
        windows = _windows(rows)
        constrained = self._constrain(windows)  # before the drafts are read: it may write them
        num_graphs = self._num_graphs()
        logits = self._forward(rows, behind)
        num_sampled = sum(row.num_sampled + row.num_gated_tokens for row, _ in windows)
        chosen = self._choose(windows, logits[:num_sampled], constrained) if windows else None
        return LaunchedStep(
            plan=plan,
            drafting=self.drafting,
            rows=rows,
            chosen=chosen,
            predictions=None if chosen is None else _copy_windows(windows, logits[:num_sampled], chosen),
            num_gated=num_gated,
            scores=self._score_prompts(rows, logits[num_sampled:]) if num_sampled < len(logits) else None,
            is_awaited=len(logits) > 0 or not self.is_asynchronous,
            has_captured=self._num_graphs() != num_graphs,
        )

    def _write_drafts(self, rows: Sequence[TextRow]) -> dict[int, int]:
        """Make the drafts of all windows; by slot, how many tokens of them the gated adapter had proposed."""
        wanted = [
            (row.slot, text, row.last_accepted_position + 1, row.num_sampled - 1)
            for row, text in rows
            if row.num_sampled > 1
        ]
        sources, gated = self.drafting.write(wanted), self.drafting.gated
        if gated is None:
            return {}
        return {
            slot: min(gated.num_ready(slot, text_end), num_tokens)
            for (slot, _, text_end, num_tokens), source in zip(wanted, sources, strict=True)
            if source == gated.name
        }

    def _constrain(self, windows: Sequence[TextRow]) -> ConstrainedRows | None:
        """The windows that have to match a grammar, None where there are none."""
        found: list[ConstrainedRow] = []
        first_index = 0
        for row, text in windows:
            if text.admission.constraint is not None:
                found.append(ConstrainedRow(row, text, text.admission.constraint, first_index))
            first_index += row.num_sampled
        return ConstrainedRows(found, self._mask_filler, self._device) if found else None

    @cached_property
    def _mask_filler(self) -> MaskFiller:
        return MaskFiller(torch.get_num_threads())

    def _forward(self, rows: Sequence[TextRow], behind: LaunchedStep | None) -> Tensor:
        """Logits [S + G + P, V].

        Of the S tokens whose prediction is wanted, then of the G rows of gated blocks, then of the P prompt tokens to
        score.
        """
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
        if behind is None:
            tokens = [text.tokens(row.first_position, row.end_position) for row, text in rows]
        else:
            tokens = [_indices_of_choices(rows, behind)]
        positions = [np.arange(row.first_position, row.end_position) for row, _ in rows]
        for row, text in rows:
            if row.gated is not None:
                blocks = _gated_spans(row, row.gated, first_index)
                spans += blocks
                tokens.append(self._gated_inputs(row.gated, row, text))
                positions += [np.arange(span.first_position, span.context_length) for span in blocks]
                sampled.append(np.arange(first_index, first_index + row.gated.num_tokens))
                first_index += row.gated.num_tokens
        packed = to_device(np.concatenate([*tokens, *positions, *sampled, *scored]), self._device)
        input_ids, places, wanted = packed.tensor_split([first_index, 2 * first_index])
        if behind is not None and behind.chosen is not None:
            input_ids = behind.chosen.index_select(0, input_ids)
        return self.model.forward(input_ids, places, spans, wanted)

    def _gated_inputs(self, blocks: GatedBlocks, row: PlannedRow, text: RequestText) -> Ids:
        assert self.drafting.gated is not None
        return self.drafting.gated.inputs(blocks, text, row.last_accepted_position + 1)

    def _choose(self, rows: Sequence[TextRow], logits: Tensor, constrained: ConstrainedRows | None) -> Tensor:
        """A token for each sampled position and gated row; [S + G] int64 by logits [S + G, V]."""
        if constrained is not None:
            logits = constrained.mask(logits)
        sampled = [_row_sampling(row, text) for row, text in rows]
        sampled += [one for row, text in rows if row.gated for one in _gated_sampling(row, row.gated, text)]
        batch = SamplingBatch.build(sampled, self._device)
        return sample(logits, batch, self.sampling)

    def _score_prompts(self, rows: Sequence[TextRow], logits: Tensor) -> HostCopy:
        """Log-probabilities of the prompt tokens behind each row's scored positions; logits [P, V]."""
        spans = [(text, row.scored_positions) for row, text in rows]
        next_ids = np.concatenate([text.tokens(span.start + 1, span.stop + 1) for text, span in spans])
        wanted = (text.admission.request.params.prompt_logprobs for _, text in rows)
        num_top = max(count for count in wanted if count is not None)
        return HostCopy(pack_logprobs(logits, to_device(next_ids, self._device), num_top))


def _windows(rows: Sequence[TextRow]) -> list[TextRow]:
    """The rows that have a window."""
    return [(row, text) for row, text in rows if row.num_sampled]


def _indices_of_choices(rows: Sequence[TextRow], behind: LaunchedStep) -> Ids:
    """Where the step before, of windows of one token, chose the token of each row; [B]."""
    index_of_slot = {row.slot: index for index, (row, _) in enumerate(behind.rows)}
    return np.array([index_of_slot[row.slot] for row, _ in rows])


def _copy_windows(rows: Sequence[TextRow], logits: Tensor, chosen: Tensor) -> HostCopy:
    """What LaunchedStep.predictions holds; logits [S + G, V], chosen [S + G]."""
    # Where hidden states are not finite, no logit is: the chosen one tells for all of them.
    chosen_logits = logits.gather(1, chosen[:, None])
    columns = [chosen[:, None].where(chosen_logits.isfinite(), NOT_FINITE)]
    num_top = _num_top_logprobs(rows)
    if num_top is not None:
        # For all rows, asked or not: the copy stays one rectangle, and few steps have such rows.
        columns.append(pack_logprobs(logits, chosen, num_top))
    return HostCopy(torch.cat(columns, dim=1))


def _read_scores(rows: Sequence[TextRow], scores: HostCopy) -> list[tuple[TokenLogprobs, ...]]:
    """Of the prompt tokens behind each row's scored positions."""
    parts = np.split(scores.wait(), np.cumsum([len(row.scored_positions) for row, _ in rows])[:-1])
    wanted = [text.admission.request.params.prompt_logprobs for _, text in rows]
    return [unpack_logprobs(part, count or 0) for part, count in zip(parts, wanted, strict=True)]


def _row_sampling(row: PlannedRow, text: RequestText) -> RowSampling:
    admission = text.admission
    return RowSampling(
        params=admission.request.params,
        named=text.named,
        seed=admission.seed,
        choice_index=admission.request.choice_index,
        num_positions=row.num_sampled,
        first_output_position=row.last_accepted_position + 1 - len(admission.request.prompt_ids),
        counts=text.window_counts(row.last_accepted_position + 1, row.num_sampled - 1),
    )


def _gated_spans(row: PlannedRow, blocks: GatedBlocks, first_index: int) -> list[RowSpan]:
    """The blocks as rows that see a part of the text and of the window; their slots follow the window's."""
    text_end = row.last_accepted_position + 1
    spans = []
    for number, length in enumerate(blocks.lengths):
        first_position, first_slot = text_end + length, row.end_position + number * blocks.size
        spans.append(
            RowSpan(
                first_index + number * blocks.size,
                blocks.size,
                first_position,
                row.block_ids,
                blocks.adapter_id,
                gap=first_slot - first_position,
            )
        )
    return spans


def _gated_sampling(row: PlannedRow, blocks: GatedBlocks, text: RequestText) -> list[RowSampling]:
    """Proposals are chosen as the tokens that they are for, by the noise of those positions, but for penalties."""
    admission = text.admission
    first_output_position = row.last_accepted_position + 2 - len(admission.request.prompt_ids)
    return [
        RowSampling(
            params=text.proposal_params,
            named=text.named,
            seed=admission.seed,
            choice_index=admission.request.choice_index,
            num_positions=blocks.size,
            first_output_position=first_output_position + length,
        )
        for length in blocks.lengths
    ]


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
    num_top = text.admission.request.params.logprobs
    return RowResult(
        window_ids=window_ids,
        predicted_ids=predicted_ids,
        num_accepted=num_accepted,
        logprobs=None if num_top is None else unpack_logprobs(values[:num_accepted, 1:], num_top),
    )
