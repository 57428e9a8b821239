"""Triton kernels: attention of a step, straight from the paged cache, and what lies between a layer's products.

Flash attention (arXiv:2205.14135) with the context split over programs (arXiv:2311.01282), for rows of any number of
query tokens. The query heads that share a KV head are further queries of it, so every key is read once per tile.

::

    program (tile, KV head, split)     tile: up to BLOCK_M queries x heads of one row; split: a part of its context

Imported where Triton is installed; every CUDA build of torch for Linux brings it, and its interpreter runs these
kernels on a CPU in the tests.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _find_row(query_starts_ptr, num_rows, tile, tile_queries: tl.constexpr, MAX_ROWS: tl.constexpr):  # noqa: N803
    """The row that a tile is of, where its queries begin, how many they are, and the first of them in the tile."""
    # Row r owns the tiles from query_starts[r] // tile_queries + r on: enough for its queries, whatever the others are.
    index = tl.arange(0, MAX_ROWS)
    starts = tl.load(query_starts_ptr + index, mask=index < num_rows, other=0)
    row = tl.sum(((starts // tile_queries + index <= tile) & (index < num_rows)).to(tl.int32)) - 1
    row_start = tl.load(query_starts_ptr + row)
    num_queries = tl.load(query_starts_ptr + row + 1) - row_start
    return row, row_start, num_queries, (tile - row_start // tile_queries - row) * tile_queries


@triton.jit
def _find_key_blocks(first_key, end, split, num_splits, BLOCK_N: tl.constexpr):  # noqa: N803
    """The blocks of keys of one split, first and end: splits share those that some query of a tile sees."""
    first_block, end_block = tl.maximum(first_key, 0) // BLOCK_N, tl.cdiv(end, BLOCK_N)
    num_blocks = tl.cdiv(tl.maximum(end_block - first_block, 0), num_splits)
    first_block += split * num_blocks
    return first_block, tl.minimum(first_block + num_blocks, end_block)


@triton.jit
def _softmax_update(scores, values, maximum, total, weighted):
    """Online softmax: the running maximum, sum of weights and weighted sum of values, with one more block of keys."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # Where nothing was visible yet, -inf - -inf would make NaN.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(maximum - shift)
    weighted = weighted * kept[:, None]
    weighted += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_maximum, total * kept + tl.sum(weights, 1), weighted


@triton.jit
def _cap(scores, softcap):
    """softcap * tanh(scores / softcap)."""
    return softcap * (2.0 * tl.sigmoid(2.0 / softcap * scores) - 1.0)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "window"])
def attend(  # noqa: PLR0917 - a kernel takes its tensors and their strides one by one
    query_ptr,  # [T, H, D_k]
    keys_ptr,  # [blocks, PAGE, H_kv, D_k], contiguous
    values_ptr,  # [blocks, PAGE, H_kv, D_v], contiguous
    out_ptr,  # [T, H, D_v] where IS_WHOLE, else [T, H, splits, D_v] float32, not yet divided by the sums
    maxima_ptr,  # [T, H, splits] float32, of the scores in base 2
    sums_ptr,  # [T, H, splits] float32, of exp2(score - maximum)
    query_starts_ptr,  # [num_rows + 1] int32
    context_lengths_ptr,  # [num_rows] int32
    block_starts_ptr,  # [num_rows] int32
    gaps_ptr,  # [num_rows] int32
    block_ids_ptr,  # int32
    sinks_ptr,  # [H] float32 where HAS_SINKS
    scale,
    softcap,  # where HAS_SOFTCAP
    window,  # tokens that a token sees, itself included
    num_rows,
    num_splits,
    query_stride,
    query_head_stride,
    NUM_HEADS: tl.constexpr,  # noqa: N803 - Triton's way to name compile-time values
    NUM_KV_HEADS: tl.constexpr,  # noqa: N803
    KEY_SIZE: tl.constexpr,  # noqa: N803
    VALUE_SIZE: tl.constexpr,  # noqa: N803
    PAGE: tl.constexpr,  # noqa: N803 - tokens in a cache block
    MAX_ROWS: tl.constexpr,  # noqa: N803 - power of two, at least num_rows
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803 - keys per iteration of the loop
    PADDED_KEY: tl.constexpr,  # noqa: N803 - sizes rounded up to a power of two
    PADDED_VALUE: tl.constexpr,  # noqa: N803
    IS_WHOLE: tl.constexpr,  # noqa: N803 - there is one split, which finishes the result
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    HAS_SINKS: tl.constexpr,  # noqa: N803
):
    """Attention of one tile over one split of its row's context; see the module and `TableAttention`."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    repeat: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    tile_queries: tl.constexpr = BLOCK_M // repeat

    row, row_start, num_queries, first_query = _find_row(query_starts_ptr, num_rows, tile, tile_queries, MAX_ROWS)
    if first_query >= num_queries:
        return

    index = tl.arange(0, BLOCK_M)
    query = first_query + index // repeat
    head = kv_head * repeat + index % repeat
    is_query = (query < num_queries) & (index < tile_queries * repeat)
    token = (row_start + query).to(tl.int64)
    context_length = tl.load(context_lengths_ptr + row)
    position = context_length - num_queries + query

    key_dim, value_dim = tl.arange(0, PADDED_KEY), tl.arange(0, PADDED_VALUE)
    queries = tl.load(
        query_ptr + token[:, None] * query_stride + head[:, None] * query_head_stride + key_dim[None, :],
        mask=is_query[:, None] & (key_dim < KEY_SIZE)[None, :],
        other=0.0,
    )

    first_position = context_length - num_queries + first_query
    # Keys are walked by slot: those before the row lie at their positions, its own behind the gap.
    gap, first_own = tl.load(gaps_ptr + row), context_length - num_queries
    end = tl.minimum(context_length, first_position + tile_queries) + gap
    first_block, end_block = _find_key_blocks(first_position - window + 1, end, split, num_splits, BLOCK_N)

    block_ids_ptr += tl.load(block_starts_ptr + row)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, PADDED_VALUE], tl.float32)
    if HAS_SINKS:  # the first split begins with them: their scores are the largest so far
        sinks = tl.load(sinks_ptr + head, mask=is_query, other=0.0) * _LOG2_E
        maximum = tl.where(split == 0, sinks, maximum)
        total += (split == 0).to(tl.float32)
    for key_block in range(first_block, end_block):
        slot = key_block * BLOCK_N + tl.arange(0, BLOCK_N)
        is_key = slot < end
        block = tl.load(block_ids_ptr + slot // PAGE, mask=is_key, other=0).to(tl.int64)
        slot_head = (block * PAGE + slot % PAGE) * NUM_KV_HEADS + kv_head
        keys = tl.load(
            keys_ptr + slot_head[None, :] * KEY_SIZE + key_dim[:, None],
            mask=is_key[None, :] & (key_dim < KEY_SIZE)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee")
        scores = _cap(scores * scale, softcap) * _LOG2_E if HAS_SOFTCAP else scores * (scale * _LOG2_E)
        key_position = tl.where(slot < first_own, slot, slot - gap)
        is_seen = (slot < first_own) | (slot >= first_own + gap)
        behind = position[:, None] - key_position[None, :]
        is_seen = (behind >= 0) & (behind < window) & is_query[:, None] & is_seen[None, :]
        scores = tl.where(is_seen, scores, float("-inf"))
        values = tl.load(
            values_ptr + slot_head[:, None] * VALUE_SIZE + value_dim[None, :],
            mask=is_key[:, None] & (value_dim < VALUE_SIZE)[None, :],
            other=0.0,
        )
        maximum, total, weighted = _softmax_update(scores, values, maximum, total, weighted)

    out_index = token * NUM_HEADS + head
    if IS_WHOLE:
        # Tokens of padding see nothing: 0, not 0 / 0.
        weighted /= tl.where(total == 0.0, 1.0, total)[:, None]
    else:
        out_index = out_index * num_splits + split
        tl.store(maxima_ptr + out_index, maximum, mask=is_query)
        tl.store(sums_ptr + out_index, total, mask=is_query)
    is_out = is_query[:, None] & (value_dim < VALUE_SIZE)[None, :]
    tl.store(out_ptr + out_index[:, None] * VALUE_SIZE + value_dim[None, :], weighted, mask=is_out)


@triton.jit(do_not_specialize=["num_splits"])
def combine(  # noqa: PLR0917
    parts_ptr,  # [T, H, splits, D_v] float32
    maxima_ptr,  # [T, H, splits] float32
    sums_ptr,  # [T, H, splits] float32
    out_ptr,  # [T, H, D_v], contiguous
    num_splits,
    VALUE_SIZE: tl.constexpr,  # noqa: N803
    PADDED_VALUE: tl.constexpr,  # noqa: N803
    MAX_SPLITS: tl.constexpr,  # noqa: N803 - power of two, at least num_splits
):
    """Reduce the splits of one token's head; program (token * H + head)."""
    head = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, MAX_SPLITS), tl.arange(0, PADDED_VALUE)
    is_split = split < num_splits
    maxima = tl.load(maxima_ptr + head * num_splits + split, mask=is_split, other=float("-inf"))
    sums = tl.load(sums_ptr + head * num_splits + split, mask=is_split, other=0.0)
    maximum = tl.max(maxima, 0)
    weights = tl.exp2(maxima - tl.where(maximum == float("-inf"), 0.0, maximum))
    parts = tl.load(
        parts_ptr + (head * num_splits + split)[:, None] * VALUE_SIZE + dim[None, :],
        mask=is_split[:, None] & (dim < VALUE_SIZE)[None, :],
        other=0.0,
    )
    total = tl.sum(sums * weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + head * VALUE_SIZE + dim, result, mask=dim < VALUE_SIZE)


@triton.jit
def _rotate(from_ptr, to_ptr, cos_ptr, sin_ptr, pair, mask, HALF: tl.constexpr):  # noqa: N803, PLR0917
    """Write heads with RoPE applied: element `pair` of a head rotates with element HALF + pair."""
    number = to_ptr.dtype.element_ty
    first = tl.load(from_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(from_ptr + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    cos_first = tl.load(cos_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    # Rounded in between, where torch.mul before torch.addcmul rounds: the bits are those of `layer_ops.TorchRope`.
    kept_first = (first * cos_first).to(number).to(tl.float32)
    kept_second = (second * cos_second).to(number).to(tl.float32)
    tl.store(to_ptr + pair, kept_first - second * sin_first, mask=mask)
    tl.store(to_ptr + HALF + pair, kept_second + first * sin_second, mask=mask)


@triton.jit
def rope_and_store_kv(  # noqa: PLR0917
    query_ptr,  # [T, H, D]
    key_ptr,  # [T, H_kv, D]
    value_ptr,  # [T, H_kv, D]
    cos_ptr,  # [T, D], contiguous
    sin_ptr,  # [T, D], contiguous
    slots_ptr,  # [T] int32
    rotated_ptr,  # [T, H, D], contiguous
    keys_ptr,  # [slots, H_kv, D], contiguous
    values_ptr,  # [slots, H_kv, D], contiguous
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    NUM_KV_HEADS: tl.constexpr,  # noqa: N803
    REPEAT: tl.constexpr,  # noqa: N803 - query heads of a KV head
    SIZE: tl.constexpr,  # noqa: N803
    PADDED_REPEAT: tl.constexpr,  # noqa: N803 - sizes rounded up to a power of two
    PADDED_HALF: tl.constexpr,  # noqa: N803
):
    """Apply RoPE to a KV head of a token and its query heads, store its key and value; program (token, KV head)."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = SIZE // 2
    pair = tl.arange(0, PADDED_HALF)
    is_pair = pair < half
    cos_ptr += token * SIZE
    sin_ptr += token * SIZE

    of_group = tl.arange(0, PADDED_REPEAT)[:, None]
    head = kv_head * REPEAT + of_group
    query_ptr += token * query_stride + head * query_head_stride
    rotated_ptr += (token * (NUM_KV_HEADS * REPEAT) + head) * SIZE
    _rotate(query_ptr, rotated_ptr, cos_ptr, sin_ptr, pair[None, :], (of_group < REPEAT) & is_pair[None, :], half)

    offset = (tl.load(slots_ptr + token).to(tl.int64) * NUM_KV_HEADS + kv_head) * SIZE
    key_ptr += token * key_stride + kv_head * key_head_stride
    _rotate(key_ptr, keys_ptr + offset, cos_ptr, sin_ptr, pair, is_pair, half)

    value_ptr += token * value_stride + kv_head * value_head_stride
    dim = tl.arange(0, 2 * PADDED_HALF)
    values = tl.load(value_ptr + dim, mask=dim < SIZE)
    tl.store(values_ptr + offset + dim, values, mask=dim < SIZE)


@triton.jit
def gate(
    both_ptr,  # [T, 2 * SIZE], contiguous: gate, then what it gates
    out_ptr,  # [T, SIZE], contiguous
    SIZE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """silu of the first half times the second; program (token, block of numbers)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    both_ptr += token * (2 * SIZE)
    gates = tl.load(both_ptr + column, mask=mask, other=0.0).to(tl.float32)
    gated = tl.load(both_ptr + SIZE + column, mask=mask, other=0.0).to(tl.float32)
    # Rounded in between, as by torch.silu before torch.mul.
    factor = (gates / (1.0 + tl.exp(-gates))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + token * SIZE + column, factor * gated, mask=mask)
