"""Triton kernels: attention of a step, straight from the paged cache.

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
def _fold(scores, values, maximum, total, weighted):
    """The running maximum, sum of weights and weighted sum of values with one more turn's scores and values in them."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # Where nothing was visible yet, -inf - -inf would make NaN.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(maximum - shift)
    weighted = weighted * kept[:, None]
    weighted += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_maximum, total * kept + tl.sum(weights, 1), weighted


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
    block_ids_ptr,  # int32
    scale,
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
    BLOCK_N: tl.constexpr,  # noqa: N803 - keys per turn of the loop
    PADDED_KEY: tl.constexpr,  # noqa: N803 - sizes rounded up to a power of two
    PADDED_VALUE: tl.constexpr,  # noqa: N803
    IS_WHOLE: tl.constexpr,  # noqa: N803 - there is one split, which finishes the result
):
    """Attention of one tile over one split of its row's context; see the module and `TableAttention`."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    repeat: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    tile_queries: tl.constexpr = BLOCK_M // repeat

    row, row_start, num_queries, first_query = _find_row(query_starts_ptr, num_rows, tile, tile_queries, MAX_ROWS)
    if first_query >= num_queries:
        return

    place = tl.arange(0, BLOCK_M)
    query = first_query + place // repeat
    head = kv_head * repeat + place % repeat
    is_query = (query < num_queries) & (place < tile_queries * repeat)
    token = (row_start + query).to(tl.int64)
    context_length = tl.load(context_lengths_ptr + row)
    position = context_length - num_queries + query

    key_dim, value_dim = tl.arange(0, PADDED_KEY), tl.arange(0, PADDED_VALUE)
    queries = tl.load(
        query_ptr + token[:, None] * query_stride + head[:, None] * query_head_stride + key_dim[None, :],
        mask=is_query[:, None] & (key_dim < KEY_SIZE)[None, :],
        other=0.0,
    )

    # Keys that some query of the tile sees, and of these the turns of this split.
    first_position = context_length - num_queries + first_query
    end = tl.minimum(context_length, first_position + tile_queries)
    first_turn, end_turn = tl.maximum(first_position - window + 1, 0) // BLOCK_N, tl.cdiv(end, BLOCK_N)
    num_turns = tl.cdiv(tl.maximum(end_turn - first_turn, 0), num_splits)
    first_turn += split * num_turns
    end_turn = tl.minimum(first_turn + num_turns, end_turn)

    block_ids_ptr += tl.load(block_starts_ptr + row)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, PADDED_VALUE], tl.float32)
    for turn in range(first_turn, end_turn):
        key_position = turn * BLOCK_N + tl.arange(0, BLOCK_N)
        is_key = key_position < end
        block = tl.load(block_ids_ptr + key_position // PAGE, mask=is_key, other=0).to(tl.int64)
        slot_head = (block * PAGE + key_position % PAGE) * NUM_KV_HEADS + kv_head
        keys = tl.load(
            keys_ptr + slot_head[None, :] * KEY_SIZE + key_dim[:, None],
            mask=is_key[None, :] & (key_dim < KEY_SIZE)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * (scale * _LOG2_E)
        behind = position[:, None] - key_position[None, :]
        scores = tl.where((behind >= 0) & (behind < window) & is_query[:, None], scores, float("-inf"))
        values = tl.load(
            values_ptr + slot_head[:, None] * VALUE_SIZE + value_dim[None, :],
            mask=is_key[:, None] & (value_dim < VALUE_SIZE)[None, :],
            other=0.0,
        )
        maximum, total, weighted = _fold(scores, values, maximum, total, weighted)

    place_out = token * NUM_HEADS + head
    is_out = is_query[:, None] & (value_dim < VALUE_SIZE)[None, :]
    if IS_WHOLE:
        # Tokens of padding see nothing: 0, not 0 / 0.
        result = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + place_out[:, None] * VALUE_SIZE + value_dim[None, :], result, mask=is_out)
    else:
        place_out = place_out * num_splits + split
        tl.store(out_ptr + place_out[:, None] * VALUE_SIZE + value_dim[None, :], weighted, mask=is_out)
        tl.store(maxima_ptr + place_out, maximum, mask=is_query)
        tl.store(sums_ptr + place_out, total, mask=is_query)


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
    """Put the splits of one token's head together; program (token * H + head)."""
    place = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, MAX_SPLITS), tl.arange(0, PADDED_VALUE)
    is_split = split < num_splits
    maxima = tl.load(maxima_ptr + place * num_splits + split, mask=is_split, other=float("-inf"))
    sums = tl.load(sums_ptr + place * num_splits + split, mask=is_split, other=0.0)
    maximum = tl.max(maxima, 0)
    weights = tl.exp2(maxima - tl.where(maximum == float("-inf"), 0.0, maximum))
    parts = tl.load(
        parts_ptr + (place * num_splits + split)[:, None] * VALUE_SIZE + dim[None, :],
        mask=is_split[:, None] & (dim < VALUE_SIZE)[None, :],
        other=0.0,
    )
    total = tl.sum(sums * weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + place * VALUE_SIZE + dim, result, mask=dim < VALUE_SIZE)
