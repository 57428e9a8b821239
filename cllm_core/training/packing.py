"""Packing: many examples and their noisy blocks in one sequence, one forward pass, the losses of all of them.

A pack is a list of groups; the examples of a group share the beginning of their prompts. ::

    | shared prefix | rest of prompt 1, answer 1 | block | block | rest of prompt 2, answer 2 | block | next group ...
      segment 0       segment 1, parent 0          2, parent 1      4, parent 0                 5, parent 4

Every segment is causal in itself and sees its parent up to its own first position, and the parent's parent whole.
Position ids are those each example has alone, so packing changes no loss (a test says so). Which examples go together
is decided here too, on token counts alone; tensors are made for one pack at a time.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cllm_core.text.prefixes import shared_prefix_length
from cllm_core.training.examples import NoisyBlock

_NONE = -1


@dataclass(frozen=True, slots=True)
class PackedExample:
    """An example with the noisy blocks chosen for it."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    blocks: tuple[NoisyBlock, ...] = ()


@dataclass(frozen=True, slots=True)
class PackLayout:
    """One pack as tensors, all int64: T tokens, R of which (rows) have something to predict.

    Rows are ordered by example, and a draft token's teacher row is of the same example; chunk_ends are the borders
    between examples where the rows may be cut into chunks.
    """

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T] in the example's own text
    segments: Tensor  # [T] segment of the token
    parents: Tensor  # [T] segment that this one continues, -1 for none
    grandparents: Tensor  # [T] segment that the parent continues, -1 for none
    starts: Tensor  # [T] position of the segment's first token
    row_index: Tensor  # [R] token of the row, in 0..T - 1
    target_ids: Tensor  # [R] token that the row has to predict
    teacher_rows: Tensor  # [R] row of the clean token that predicts the same position; -1: this one is clean
    chunk_ends: Tensor  # [number of examples] rows up to and including each example
    spans: Tensor  # [S, 4] begin and end of a prefix or an example, begin and end of the prefix it continues; in order

    def as_dict(self) -> dict[str, Tensor]:
        """By name, as keyword arguments of `PackedModel.forward`."""
        return {name: getattr(self, name) for name in self.__slots__}


def visible(layout: PackLayout, queries: Tensor, keys: Tensor) -> Tensor:
    """Which token sees which.

    Args:
        layout: of the pack.
        queries: [Q] int64, token indices.
        keys: [K] int64, token indices.

    Returns:
        [Q, K] bool, True where the query's token attends to the key's.
    """
    key_segments, key_positions = layout.segments[keys], layout.position_ids[keys]
    own = (layout.segments[queries][:, None] == key_segments) & (layout.position_ids[queries][:, None] >= key_positions)
    above = (layout.parents[queries][:, None] == key_segments) | (layout.grandparents[queries][:, None] == key_segments)
    return own | (above & (key_positions < layout.starts[queries][:, None]))


def build_layout(groups: Sequence[Sequence[PackedExample]]) -> PackLayout:
    """Lay out a pack.

    Args:
        groups: examples that share a prefix stand in one group.
    """
    builder = _LayoutBuilder()
    for group in groups:
        builder.add_group(group)
    return builder.build()


def without_blocks(layout: PackLayout) -> PackLayout:
    """The pack of the same prompts and answers alone: its rows are the clean ones of `layout`, in their order."""
    is_draft = layout.teacher_rows >= 0
    kept = torch.ones_like(layout.input_ids, dtype=torch.bool)
    kept[layout.row_index[is_draft]] = False
    kept_before = functional.pad(kept.cumsum(dim=0), (1, 0))  # [T + 1], where a token or a border moves to
    clean_before = functional.pad((~is_draft).cumsum(dim=0), (1, 0))
    return PackLayout(
        input_ids=layout.input_ids[kept],
        position_ids=layout.position_ids[kept],
        segments=layout.segments[kept],
        parents=layout.parents[kept],
        grandparents=layout.grandparents[kept],
        starts=layout.starts[kept],
        row_index=kept_before[layout.row_index[~is_draft]],
        target_ids=layout.target_ids[~is_draft],
        teacher_rows=layout.teacher_rows[~is_draft],
        chunk_ends=clean_before[layout.chunk_ends],
        spans=kept_before[layout.spans],
    )


@dataclass(slots=True)
class _LayoutBuilder:
    """Appends segments and rows."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segments: list[tuple[int, int, int, int, int]] = field(default_factory=list)  # segment, parents, start, length
    row_index: list[int] = field(default_factory=list)
    target_ids: list[int] = field(default_factory=list)
    teacher_rows: list[int] = field(default_factory=list)
    chunk_ends: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add_group(self, group: Sequence[PackedExample]) -> None:
        prefix = shared_prefix_length([example.prompt_ids for example in group]) if len(group) > 1 else 0
        first = len(self.input_ids)
        root = _NONE
        if prefix:
            root = self._add_segment(group[0].prompt_ids[:prefix], start=0)
            self.spans.append((first, first + prefix, first, first))
        for example in group:
            begin = len(self.input_ids)
            self._add_example(example, prefix, root)
            self.spans.append((begin, len(self.input_ids), first, first + prefix))

    def _add_example(self, example: PackedExample, prefix: int, root: int) -> None:
        num_prompt = len(example.prompt_ids)
        first_token, first_row = len(self.input_ids), len(self.row_index)
        # the last token of the answer is only predicted, never read
        own = self._add_segment(example.prompt_ids[prefix:] + example.output_ids[:-1], start=prefix, parent=root)
        predicting = first_token + num_prompt - 1 - prefix
        self.row_index += range(predicting, predicting + len(example.output_ids))
        self.target_ids += example.output_ids
        self.teacher_rows += [_NONE] * len(example.output_ids)
        for block in example.blocks:
            self.row_index += range(len(self.input_ids), len(self.input_ids) + len(block.draft_ids))
            self.target_ids += block.target_ids
            self.teacher_rows += range(first_row + block.start + 1, first_row + block.start + 1 + len(block.draft_ids))
            self._add_segment(block.draft_ids, start=num_prompt + block.start, parent=own, grandparent=root)
        self.chunk_ends.append(len(self.row_index))

    def _add_segment(
        self, token_ids: Sequence[int], *, start: int, parent: int = _NONE, grandparent: int = _NONE
    ) -> int:
        segment = len(self.segments)
        self.segments.append((segment, parent, grandparent, start, len(token_ids)))
        self.input_ids += token_ids
        self.position_ids += range(start, start + len(token_ids))
        return segment

    def build(self) -> PackLayout:
        columns = np.asarray(self.segments, dtype=np.int64)
        per_token = np.repeat(columns[:, :4], columns[:, 4], axis=0)
        segments, parents, grandparents, starts = (torch.from_numpy(per_token[:, i].copy()) for i in range(4))
        return PackLayout(
            input_ids=torch.tensor(self.input_ids),
            position_ids=torch.tensor(self.position_ids),
            segments=segments,
            parents=parents,
            grandparents=grandparents,
            starts=starts,
            row_index=torch.tensor(self.row_index),
            target_ids=torch.tensor(self.target_ids),
            teacher_rows=torch.tensor(self.teacher_rows),
            chunk_ends=torch.tensor(self.chunk_ends),
            spans=torch.tensor(self.spans),
        )


@dataclass(frozen=True, slots=True)
class ExampleSize:
    """What the planner knows of an example: its prompt, and the tokens that come on top of the prompt."""

    prompt_ids: tuple[int, ...]
    num_other: int  # answer and noisy blocks, in tokens


PackPlan = tuple[tuple[int, ...], ...]  # groups of example indices


def plan_packs(
    sizes: Sequence[ExampleSize], families: Sequence[Sequence[int]], *, pack_length: int, seed: int
) -> list[PackPlan]:
    """Divide all examples into packs of at most `pack_length` tokens, in random order.

    An example longer than that gets a pack of its own.

    Args:
        sizes: of every example.
        families: from `find_families`.
        pack_length: limit in tokens.
        seed: of the order.
    """
    rng = random.Random(seed)
    units = [unit for family in families for unit in _cut_family(sizes, family, pack_length, rng)]
    rng.shuffle(units)
    packs: list[tuple[list[tuple[int, ...]], int]] = []
    open_packs: list[int] = []  # those with room, oldest first; few, so that packing stays linear
    for indices, length in units:
        place = next((p for p in open_packs if packs[p][1] + length <= pack_length), None)
        if place is None:
            packs.append(([indices], length))
            open_packs = [*open_packs[-_MAX_OPEN_PACKS:], len(packs) - 1]
        else:
            packs[place] = ([*packs[place][0], indices], packs[place][1] + length)
    plans = [tuple(groups) for groups, _ in packs]
    rng.shuffle(plans)
    return plans


_MAX_OPEN_PACKS = 32


def find_families(prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Indices of prompts that begin alike: sorted neighbours that share at least half of the shorter one."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    families: list[list[int]] = []
    for previous, index in zip([None, *order], order, strict=False):
        if previous is not None and _share_half(prompts[previous], prompts[index]):
            families[-1].append(index)
        else:
            families.append([index])
    return families


def _share_half(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    half = (min(len(first), len(second)) + 1) // 2
    return first[:half] == second[:half]


def _cut_family(
    sizes: Sequence[ExampleSize], family: Sequence[int], pack_length: int, rng: random.Random
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Random parts of a family that fit a pack each, with their length in tokens."""
    shuffled = list(family)
    rng.shuffle(shuffled)
    prefix = shared_prefix_length([sizes[i].prompt_ids for i in family]) if len(family) > 1 else 0
    part: list[int] = []
    length = prefix
    for index in shuffled:
        own = len(sizes[index].prompt_ids) - prefix + sizes[index].num_other
        if part and length + own > pack_length:
            yield tuple(part), length
            part, length = [], prefix
        part.append(index)
        length += own
    if part:
        yield tuple(part), length
