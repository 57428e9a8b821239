"""The paged KV cache and the attention of one step over it, in plain torch: the slow, always right path.

KVCache holds the memory; PagedStep is one step's view of it, built from the step's rows. Neither knows requests or
decoding: rows are runs of tokens with a position and a block table.
"""

import math
import mmap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cllm_core.errors import ModelLoadError
from cllm_core.models.attention import Scoring


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer asks of the cache and of its attention.

    Attributes:
        num_kv_heads, key_size, value_size: shape of keys and values per token.
        features: of its scores, see Scoring.features.
    """

    num_kv_heads: int
    key_size: int
    value_size: int
    features: tuple[str, ...] = ()

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one token takes in this layer."""
        return self.num_kv_heads * (self.key_size + self.value_size) * dtype.itemsize


@dataclass(slots=True)
class LayerProbe:
    """Stands in for the cache once, at load: records what each layer would store. Attention itself is left out."""

    layers: dict[int, LayerSpec] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """See PagedAttention.attend; returns zeros of the right shape.

        Raises:
            ModelLoadError: the layer attends twice, to keys and values of which the cache would keep the second alone,
                or has a window that sees nothing.
        """
        if layer in self.layers:
            raise ModelLoadError(f"layer {layer} attends more than once in a forward pass, which is not supported")
        if scoring.window is not None and scoring.window < 1:
            raise ModelLoadError(f"layer {layer} sees a window of {scoring.window} tokens; correct it in config.json")
        self.layers[layer] = LayerSpec(key.shape[1], key.shape[2], value.shape[2], scoring.features)
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])


class KVCache:
    """Keys and values of all layers: per layer [num_blocks, block_size, H_kv, D], zero at first.

    Zeros rather than garbage: masked positions are multiplied by 0, and 0 * NaN is NaN.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shapes = [(num_blocks, block_size, spec.num_kv_heads) for spec in layers]
        self.keys = [_zeros((*shape, spec.key_size), dtype, device) for shape, spec in zip(shapes, layers, strict=True)]
        self.values = [
            _zeros((*shape, spec.value_size), dtype, device) for shape, spec in zip(shapes, layers, strict=True)
        ]

    @property
    def num_bytes(self) -> int:
        """Memory of the cache."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Zeroed memory of the system becomes real page by page as it is used. numpy would ask for huge pages: a text that
    # gets its first block in a new one waited for 2 MiB of zeros in every layer, 0.15 s in all.
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes).view(dtype).view(shape)


# Position of what no query sees: behind all of them.
_NOWHERE = 2**62


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Where a row lies in a step, in its text and in the cache.

    Attributes:
        first_index: of its tokens among the flattened ones of the step.
        num_tokens: to compute.
        first_position: of the first of them in its text; they see each other causally, and all before it.
        block_ids: cache blocks of the text.
        adapter_id: of the adapter to compute it with; 0 is none.
        gap: cache slots between the tokens before it and its own, which it does not see. So rows that go on from the
            same text in different ways, or from a part of what another row computes, share its blocks::

                slots   0 ...             first_position   first_position + gap
                        | seen            | not seen       | its own tokens |
    """

    first_index: int
    num_tokens: int
    first_position: int
    block_ids: tuple[int, ...]
    adapter_id: int = 0
    gap: int = 0

    @property
    def context_length(self) -> int:
        """Tokens the row's last token attends to, itself included."""
        return self.first_position + self.num_tokens

    @property
    def end_slot(self) -> int:
        """Slots of the blocks up to the last of its tokens."""
        return self.context_length + self.gap


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of similar shape, attended to as one padded batch of B rows, N tokens, C context slots."""

    token_index: Tensor | None  # [B * N] int64, flat tokens; None: exactly the step's tokens in order
    block_table: Tensor  # [B, C / block_size] int64
    query_positions: Tensor  # [B, N] int64
    key_positions: Tensor  # [C] or, where a row has a gap, [B, 1, C] int64; _NOWHERE for slots in a gap

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive causal mask [B, 1, N, C], 0 where visible and -inf elsewhere; `window` as in PagedAttention."""
        queries = self.query_positions[:, :, None]
        visible = self.key_positions <= queries
        if window is not None:
            visible &= self.key_positions > queries - window
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, float("-inf"))[:, None]

    def distances(self) -> Tensor:
        """[B, 1, N, C], position of each slot's token less that of the query."""
        return (self.key_positions - self.query_positions[:, :, None])[:, None]


class PagedStep:
    """Attention of one step (PagedAttention): writes the step's keys and values, attends group by group.

    Args:
        cache: the KV cache.
        rows: in the order of the step's flattened tokens.
    """

    def __init__(self, cache: KVCache, rows: Sequence[RowSpan], device: torch.device) -> None:
        self._cache = cache
        self._write_slots = torch.from_numpy(write_slots(rows, cache.block_size)).to(device)
        grouped = _group_similar(rows)
        num_tokens = sum(row.num_tokens for row in rows)
        self._groups = [_build_group(group, cache.block_size, num_tokens, device) for group in grouped]
        order = _output_order(grouped)
        is_plain = len(order) == sum(group.query_positions.numel() for group in self._groups)
        in_order = is_plain and bool((order == np.arange(len(order))).all())
        self._output_order = None if in_order else torch.from_numpy(order).to(device)
        self._masks: dict[tuple[int | None, int], list[Tensor]] = {}  # by window and queries per KV head

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """See PagedAttention.attend."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._write_slots, key)
        values.flatten(0, 1).index_copy_(0, self._write_slots, value)
        repeat = query.shape[1] // key.shape[1]
        masks = self._masks.get((scoring.window, repeat))
        if masks is None:
            masks = [group.mask(scoring.window, query.dtype).repeat(1, 1, repeat, 1) for group in self._groups]
            self._masks[scoring.window, repeat] = masks
        parts = [
            _attend_group(group, mask, query, keys=keys, values=values, scoring=scoring)
            for group, mask in zip(self._groups, masks, strict=True)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if self._output_order is None else out.index_select(0, self._output_order)


def _attend_group(
    group: RowGroup, mask: Tensor, query: Tensor, *, keys: Tensor, values: Tensor, scoring: Scoring
) -> Tensor:
    """Scaled dot-product attention of one group; returns [B * N, H, D_v]."""
    if group.token_index is not None:
        query = query.index_select(0, group.token_index)
    num_rows, num_queries = group.query_positions.shape
    num_heads, num_kv_heads = query.shape[1], keys.shape[2]
    repeat = num_heads // num_kv_heads
    # The heads that share a KV head become further queries of it, so keys and values need not be repeated.
    folded = query.view(num_rows, num_queries, num_kv_heads, repeat, -1).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(num_rows, num_kv_heads, repeat * num_queries, -1)
    gathered = _gather(keys, group.block_table), _gather(values, group.block_table)
    if scoring.features:
        distances = group.distances().repeat(1, 1, repeat, 1)
        out = weigh(folded, *gathered, mask, distances, scoring)
    else:
        out = F.scaled_dot_product_attention(folded, *gathered, attn_mask=mask, scale=scoring.scale)
    out = out.view(num_rows, num_kv_heads, repeat, num_queries, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(num_rows * num_queries, num_heads, -1)


def weigh(  # noqa: PLR0917
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, distances: Tensor, scoring: Scoring
) -> Tensor:
    """Attention with features that torch's own function lacks.

    Args:
        query: [B, H_kv, R * N, D], the R heads that share a KV head after one another.
        keys: [B, H_kv, C, D].
        values: [B, H_kv, C, D_v].
        mask: [B, 1, R * N, C], 0 where visible and -inf elsewhere.
        distances: [B, 1, R * N, C], position of the key less that of the query.
        scoring: of the layer, its sinks and slopes [H_kv * R].

    Returns:
        [B, H_kv, R * N, D_v], of the query's type; computed in float32.
    """
    scores = query.float() @ keys.float().transpose(-1, -2) * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if scoring.slopes is not None:
        scores = scores + distances * _of_queries(scoring.slopes, scores)
    scores = scores + mask.float()
    num_keys = scores.shape[-1]
    if scoring.sinks is not None:
        scores = torch.cat((scores, _of_queries(scoring.sinks, scores).expand(len(scores), -1, -1, -1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., :num_keys]
    return (weights @ values.float()).to(query.dtype)


def _of_queries(of_heads: Tensor, scores: Tensor) -> Tensor:
    """[H_kv * R] of the heads to [1, H_kv, R * N, 1] of the queries of scores [B, H_kv, R * N, C]."""
    folded = of_heads.float().view(scores.shape[1], -1)
    return folded.repeat_interleave(scores.shape[2] // folded.shape[1], dim=1)[None, :, :, None]


def _gather(cache: Tensor, block_table: Tensor) -> Tensor:
    """[num_blocks, block_size, H_kv, D] by block table [B, K] -> [B, H_kv, K * block_size, D]."""
    num_rows = block_table.shape[0]
    return cache.index_select(0, block_table.flatten()).view(num_rows, -1, *cache.shape[2:]).transpose(1, 2)


def write_slots(rows: Sequence[RowSpan], block_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Cache slot (block * block_size + offset) of each of the step's tokens, [T] int64."""
    slots = np.empty(sum(row.num_tokens for row in rows), dtype=np.int64)
    for row in rows:
        positions = np.arange(row.first_position, row.context_length) + row.gap
        block_ids = np.asarray(row.block_ids, dtype=np.int64)
        slots[row.first_index : row.first_index + row.num_tokens] = (
            block_ids[positions // block_size] * block_size + positions % block_size
        )
    return slots


def _group_similar(rows: Sequence[RowSpan]) -> list[list[RowSpan]]:
    """Rows whose token counts and context lengths each lie between the same powers of two: padding stays below 4x."""
    groups: defaultdict[tuple[int, int], list[RowSpan]] = defaultdict(list)
    for row in rows:
        groups[(row.num_tokens.bit_length(), row.context_length.bit_length())].append(row)
    return list(groups.values())


def _build_group(rows: list[RowSpan], block_size: int, num_step_tokens: int, device: torch.device) -> RowGroup:
    num_queries = max(row.num_tokens for row in rows)
    num_blocks = max(-(-row.end_slot // block_size) for row in rows)
    # Padding repeats a row's last token and block; the mask hides the block, nobody reads the token.
    offsets = np.stack([np.minimum(np.arange(num_queries), row.num_tokens - 1) for row in rows])
    token_index = offsets + np.asarray([[row.first_index] for row in rows])
    positions = offsets + np.asarray([[row.first_position] for row in rows])
    table = np.zeros((len(rows), num_blocks), dtype=np.int64)
    for index, row in enumerate(rows):
        used = row.block_ids[:num_blocks]
        table[index, : len(used)] = used
    is_whole_step = token_index.size == num_step_tokens and bool((np.diff(token_index.ravel()) == 1).all())
    return RowGroup(
        token_index=None if is_whole_step else torch.from_numpy(token_index.ravel()).to(device),
        block_table=torch.from_numpy(table).to(device),
        query_positions=torch.from_numpy(positions).to(device),
        key_positions=torch.from_numpy(_key_positions(rows, num_blocks * block_size)).to(device),
    )


def _key_positions(rows: Sequence[RowSpan], num_slots: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """RowGroup.key_positions."""
    slots = np.arange(num_slots)
    if not any(row.gap for row in rows):
        return slots
    first_hidden = np.array([[row.first_position] for row in rows])
    gaps = np.array([[row.gap] for row in rows])
    positions = np.where(slots < first_hidden, slots, slots - gaps)
    is_hidden = (slots >= first_hidden) & (slots < first_hidden + gaps)
    return np.where(is_hidden, _NOWHERE, positions)[:, None]


def _output_order(groups: list[list[RowSpan]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where each of the step's tokens lies in the concatenation of the padded groups, [T] int64."""
    order = np.empty(sum(row.num_tokens for group in groups for row in group), dtype=np.int64)
    offset = 0
    for group in groups:
        num_queries = max(row.num_tokens for row in group)
        for row in group:
            order[row.first_index : row.first_index + row.num_tokens] = offset + np.arange(row.num_tokens)
            offset += num_queries
    return order
