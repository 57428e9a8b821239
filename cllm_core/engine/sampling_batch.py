"""SamplingBatch: how the tokens of one step are to be chosen, as tensors grouped by what the rows use.

Built by the ModelRunner from host values for every step; `cllm_core.engine.sampling.sample` reads it. What no row
uses is None, so that it costs nothing. Each group reaches the device in one copy of integers and one of floats.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cllm_core.engine.drafts import Ids
from cllm_core.engine.named_tokens import NamedTokens
from cllm_core.engine.noise import position_keys
from cllm_core.models.transfer import to_device
from cllm_core.request import SamplingParams

Columns = Sequence[Sequence[float] | NDArray[np.int64] | NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """One request's part of a step: `num_positions` predictions for consecutive output positions.

    ::

        text        prompt ... | output, accepted so far | draft ...
        predicts                                       k   k + 1 ...     k = first_output_position
    """

    params: SamplingParams
    named: NamedTokens  # of these params, and the tokens that end the output
    seed: int  # of the noise, 64 bit, signed or not
    choice_index: int = 0  # which of the choices of one API call
    num_positions: int  # sampled positions of the row, >= 1
    first_output_position: int  # output tokens accepted so far; the index of the token that the first position predicts
    num_prompt_tokens: int  # >= 1


@dataclass(frozen=True, slots=True)
class LogitBias:
    """values[i] is added to the logit of token_ids[i] at positions[i]; all [N]."""

    positions: Tensor
    token_ids: Tensor
    values: Tensor

    @classmethod
    def build(cls, rows: Sequence["_PlacedRow"], device: torch.device) -> Self | None:
        """The biases of all rows, None where there are none."""
        biased = [placed for placed in rows if len(placed.row.named.bias_ids)]
        if not biased:
            return None
        places = _at_each([(placed.positions, placed.row.named.bias_ids) for placed in biased])
        values = [np.tile(placed.row.named.bias_values, placed.row.num_positions) for placed in biased]
        return cls(*_integers(places, device), *_floats([np.concatenate(values)], device))


@dataclass(frozen=True, slots=True)
class Suppression:
    """token_ids[i] cannot be chosen at positions[i]; both [N]."""

    positions: Tensor
    token_ids: Tensor

    @classmethod
    def build(cls, rows: Sequence["_PlacedRow"], device: torch.device) -> Self | None:
        """Stop tokens at output positions before min_tokens, None where there are none."""
        entries = [
            (placed.positions_before(placed.row.params.min_tokens), placed.row.named.stop_ids)
            for placed in rows
            if placed.suppresses_stops
        ]
        return cls(*_integers(_at_each(entries), device)) if entries else None


@dataclass(frozen=True, slots=True)
class Penalty:
    """Positions whose logits depend on the text before them: position i counts history[rows[i], starts[i] : ends[i]].

    Attributes:
        positions: [N] int64, index into the step's positions.
        rows: [N] int64, index into the rows of the history.
        starts, ends: [N] int64, columns of the history.
        strengths: one or more [N] float32.
    """

    positions: Tensor
    rows: Tensor
    starts: Tensor
    ends: Tensor
    strengths: tuple[Tensor, ...]

    @classmethod
    def build_output(
        cls, rows: Sequence["_PlacedRow"], history_rows: Sequence[int], device: torch.device
    ) -> Self | None:
        """Presence and frequency penalty, over output tokens; None where no row has one."""
        windows = [
            (*window, placed.row.params.presence_penalty, placed.row.params.frequency_penalty)
            for placed in rows
            if placed.row.params.penalizes_output
            for window in placed.history_windows(history_rows.index(placed.index), placed.row.num_prompt_tokens)
        ]
        return cls._build(windows, device)

    @classmethod
    def build_repetition(
        cls, rows: Sequence["_PlacedRow"], history_rows: Sequence[int], device: torch.device
    ) -> Self | None:
        """Repetition penalty, over prompt and output tokens; None where no row has one."""
        windows = [
            (*window, placed.row.params.repetition_penalty)
            for placed in rows
            if placed.row.params.penalizes_repetition
            for window in placed.history_windows(history_rows.index(placed.index), 0)
        ]
        return cls._build(windows, device)

    @classmethod
    def _build(cls, windows: Sequence[tuple[float, ...]], device: torch.device) -> Self | None:
        if not windows:
            return None
        columns = tuple(zip(*windows, strict=True))
        positions, rows, starts, ends = _integers(columns[:4], device)
        return cls(positions, rows, starts, ends, strengths=_floats(columns[4:], device))


@dataclass(frozen=True, slots=True)
class Draw:
    """Positions that are sampled at random and use the same truncations; None is off for all of them.

    Attributes:
        positions: [N] int64.
        keys: [N, 2] int64, of the noise.
        temperature: [N] float32, > 0.
        top_k: [N] int64, >= 1.
        max_top_k: the largest of top_k.
        top_p, min_p: [N] float32.
    """

    positions: Tensor
    keys: Tensor
    temperature: Tensor
    top_k: Tensor | None
    max_top_k: int
    top_p: Tensor | None
    min_p: Tensor | None

    @classmethod
    def build(cls, rows: Sequence["_PlacedRow"], device: torch.device) -> Self:
        """From rows that use the same truncations."""
        params = rows[0].row.params
        places = [(position, placed.row.params.top_k) for placed in rows for position in placed.positions]
        numbers = [
            (one.temperature, one.top_p, one.min_p)
            for one in (placed.row.params for placed in rows for _ in placed.positions)
        ]
        integers = (*zip(*places, strict=True), *_host_keys(rows).T.tolist())
        positions, top_k, key_0, key_1 = _integers(integers, device)
        temperature, top_p, min_p = _floats(tuple(zip(*numbers, strict=True)), device)
        return cls(
            positions=positions,
            keys=torch.stack((key_0, key_1), dim=-1),
            temperature=temperature,
            top_k=top_k if params.top_k > 0 else None,
            max_top_k=max(placed.row.params.top_k for placed in rows),
            top_p=top_p if params.top_p < 1 else None,
            min_p=min_p if params.min_p > 0 else None,
        )


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How the T sampled positions of a step are chosen, row after row in the order of the rows.

    Attributes:
        num_positions: T.
        has_greedy: some position takes the likeliest token.
        max_token_id: largest token id that a bias or a suppression names, -1 for none; must be in the vocabulary.
        history_rows: indices of the rows whose text `sample` needs to see, ascending; empty where none has a penalty.
        history_length: longest text visible to a position of these rows, draft included, in tokens.
    """

    num_positions: int
    has_greedy: bool
    max_token_id: int
    bias: LogitBias | None
    suppression: Suppression | None
    repetition: Penalty | None
    output_penalty: Penalty | None
    draws: tuple[Draw, ...]
    history_rows: tuple[int, ...]
    history_length: int

    @classmethod
    def build(cls, rows: Sequence[RowSampling], device: torch.device) -> Self:
        """Lay the rows out one after another. Waits for nothing on the device."""
        placed = list(_place(rows))
        with_history = [one for one in placed if one.row.params.has_penalties]
        history_rows = tuple(one.index for one in with_history)
        return cls(
            num_positions=sum(row.num_positions for row in rows),
            has_greedy=any(row.params.is_greedy for row in rows),
            max_token_id=max((one.max_token_id for one in placed), default=-1),
            bias=LogitBias.build(placed, device),
            suppression=Suppression.build(placed, device),
            repetition=Penalty.build_repetition(placed, history_rows, device),
            output_penalty=Penalty.build_output(placed, history_rows, device),
            draws=tuple(Draw.build(group, device) for group in _group_by_truncation(placed)),
            history_rows=history_rows,
            history_length=max((one.num_visible + one.row.num_positions - 1 for one in with_history), default=0),
        )

    @property
    def needs_history(self) -> bool:
        """Whether `sample` must be given the text of `history_rows`."""
        return bool(self.history_rows)


@dataclass(frozen=True, slots=True)
class _PlacedRow:
    """A row and where its positions lie in the step."""

    row: RowSampling
    index: int
    start: int

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.row.num_positions)

    @property
    def num_visible(self) -> int:
        """Tokens of the text that the first position sees; each later one sees one draft token more."""
        return self.row.num_prompt_tokens + self.row.first_output_position

    @property
    def suppresses_stops(self) -> bool:
        """Whether the first position comes before min_tokens, and there are tokens that end the output."""
        return self.row.first_output_position < self.row.params.min_tokens and len(self.row.named.stop_ids) > 0

    @property
    def max_token_id(self) -> int:
        """The largest that a bias or a suppression of the row names, -1 for none."""
        named = self.row.named
        return max(named.max_bias_id, named.max_stop_id if self.suppresses_stops else -1)

    def history_windows(self, history_row: int, start: int) -> Iterator[tuple[int, int, int, int]]:
        """For each position: itself, its row of the history, and the range of columns that it counts."""
        for offset, position in enumerate(self.positions):
            yield position, history_row, start, self.num_visible + offset

    def positions_before(self, output_position: int) -> range:
        """Positions that predict an output token before this one."""
        count = min(self.row.num_positions, max(0, output_position - self.row.first_output_position))
        return range(self.start, self.start + count)


def _place(rows: Sequence[RowSampling]) -> Iterator[_PlacedRow]:
    start = 0
    for index, row in enumerate(rows):
        yield _PlacedRow(row, index, start)
        start += row.num_positions


def _group_by_truncation(rows: Sequence[_PlacedRow]) -> list[list[_PlacedRow]]:
    groups: defaultdict[tuple[bool, bool, bool], list[_PlacedRow]] = defaultdict(list)
    for placed in rows:
        params = placed.row.params
        if not params.is_greedy:
            groups[params.top_k > 0, params.top_p < 1, params.min_p > 0].append(placed)
    return list(groups.values())


def _host_keys(rows: Sequence[_PlacedRow]) -> Tensor:
    """Noise keys [N, 2] of all positions of the rows; on the host, where tiny operations cost least."""
    columns = [
        (_signed64(placed.row.seed), placed.row.choice_index, placed.row.first_output_position + offset)
        for placed in rows
        for offset in range(placed.row.num_positions)
    ]
    return position_keys(*torch.tensor(columns).T)


def _signed64(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


def _at_each(entries: Sequence[tuple[range, Ids]]) -> tuple[Ids, Ids]:
    """Every token of an entry at every position of it, position after position: positions and tokens, [N] each."""
    positions = [np.repeat(np.arange(span.start, span.stop), len(token_ids)) for span, token_ids in entries]
    return np.concatenate(positions), np.concatenate([np.tile(token_ids, len(span)) for span, token_ids in entries])


def _integers(columns: Columns, device: torch.device) -> tuple[Tensor, ...]:
    return _copy_to_device(np.array(columns, dtype=np.int64), device)


def _floats(columns: Columns, device: torch.device) -> tuple[Tensor, ...]:
    return _copy_to_device(np.array(columns, dtype=np.float32), device)


def _copy_to_device(table: np.ndarray, device: torch.device) -> tuple[Tensor, ...]:
    """Rows of the table, each a tensor on the device, moved in one copy that the host does not wait for."""
    return to_device(table, device).unbind(0)
