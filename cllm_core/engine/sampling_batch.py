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

from cllm_core.engine.ids import Ids
from cllm_core.engine.named_tokens import NamedTokens
from cllm_core.engine.noise import position_keys
from cllm_core.engine.token_counts import WindowCounts
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
    counts: WindowCounts | None = None  # of num_positions; given exactly where the params have penalties


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
class Penalties:
    """Logits that depend on the text before them: that of token_ids[i] at positions[i]; all [N], no pair twice.

    Attributes:
        text_counts: how often prompt, output and draft before the position have the token.
        output_counts: the same without the prompt.
        repetition, presence, frequency: strengths.
    """

    positions: Tensor
    token_ids: Tensor
    text_counts: Tensor
    output_counts: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor

    @classmethod
    def build(cls, rows: Sequence["_PlacedRow"], device: torch.device) -> Self | None:
        """The penalties of all rows, None where there are none."""
        counted = [(placed, placed.row.counts) for placed in rows if placed.row.counts is not None]
        if not counted:
            return None
        places = _at_each([(placed.positions, counts.token_ids) for placed, counts in counted])
        strengths = [
            np.repeat(
                [[params.repetition_penalty], [params.presence_penalty], [params.frequency_penalty]],
                counts.text.size,
                1,
            )
            for params, counts in ((placed.row.params, counts) for placed, counts in counted)
        ]
        numbers = (
            np.concatenate([counts.text.ravel() for _, counts in counted]),
            np.concatenate([counts.output.ravel() for _, counts in counted]),
            *np.concatenate(strengths, axis=1),
        )
        return cls(*_integers(places, device), *_floats(numbers, device))


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
    """

    num_positions: int
    has_greedy: bool
    max_token_id: int
    bias: LogitBias | None
    suppression: Suppression | None
    penalties: Penalties | None
    draws: tuple[Draw, ...]

    @classmethod
    def build(cls, rows: Sequence[RowSampling], device: torch.device) -> Self:
        """Lay the rows out one after another. Waits for nothing on the device."""
        placed = list(_place(rows))
        return cls(
            num_positions=sum(row.num_positions for row in rows),
            has_greedy=any(row.params.is_greedy for row in rows),
            max_token_id=max((one.max_token_id for one in placed), default=-1),
            bias=LogitBias.build(placed, device),
            suppression=Suppression.build(placed, device),
            penalties=Penalties.build(placed, device),
            draws=tuple(Draw.build(group, device) for group in _group_by_truncation(placed)),
        )


@dataclass(frozen=True, slots=True)
class _PlacedRow:
    """A row and where its positions lie in the step."""

    row: RowSampling
    start: int

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.row.num_positions)

    @property
    def suppresses_stops(self) -> bool:
        """Whether the first position comes before min_tokens, and there are tokens that end the output."""
        return self.row.first_output_position < self.row.params.min_tokens and len(self.row.named.stop_ids) > 0

    @property
    def max_token_id(self) -> int:
        """The largest that a bias or a suppression of the row names, -1 for none."""
        named = self.row.named
        return max(named.max_bias_id, named.max_stop_id if self.suppresses_stops else -1)

    def positions_before(self, output_position: int) -> range:
        """Positions that predict an output token before this one."""
        count = min(self.row.num_positions, max(0, output_position - self.row.first_output_position))
        return range(self.start, self.start + count)


def _place(rows: Sequence[RowSampling]) -> Iterator[_PlacedRow]:
    start = 0
    for row in rows:
        yield _PlacedRow(row, start)
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
