/* Causal attention over the paged KV cache, online over chunks of keys (arXiv:2205.14135). Head sizes are multiples of
 * LANES up to MAX_HEAD. A query's result does not depend on what else is in the step: its sums run in the order of the
 * keys, and chunks begin at the same positions for all queries.
 *
 * Values lie in the cache token by token, keys in tiles of LANES tokens of a block, so that one instruction multiplies
 * a pair of a query's numbers with those of several keys:
 *     keys   [block][num_kv_heads][block_size / LANES][size / 2][LANES][2]
 *     values [block][block_size][num_kv_heads][size]
 */

#include "kernels.h"

#define MAX_HEAD 256
#define UNSEEN (-1e30f)
#define GROUP 16 /* queries of one row that share a KV head, computed by one thread */
#define CHUNK 64 /* keys */
#define QUERIES 4 /* whose sums are kept in registers together */
#define VECTORS (WIDTH == 8 ? 2 : 4) /* of sums per query, likewise: AVX2 has half as many registers */

/* Attention of one layer. Tokens are query_stride numbers apart in query, num_heads * size in out. window: a token sees
 * itself and the window - 1 tokens before it; 0: all. softcap: scores s become softcap * tanh(s / softcap); 0: they stay.
 * sinks: a score of each head that takes its part of the softmax and brings no value; NULL: none. */
typedef struct {
    const bf16 *query;
    const bf16 *keys;
    const bf16 *values;
    const row_span *rows;
    const int64_t *block_ids;
    bf16 *out;
    int64_t query_stride, num_rows, block_size, num_heads, num_kv_heads, size, window;
    float scale, softcap;
    const float *sinks;
} attention;

/* A group's queries as their products with keys read them: bfloat16 where instructions multiply such, else float32. */
#ifdef __AVX512BF16__
typedef bf16 query_number;
#else
typedef float query_number;
#endif

typedef struct {
    int64_t kv_head, count;
    query_number queries[GROUP][MAX_HEAD] __attribute__((aligned(64)));
    bf16 *outs[GROUP];
    int64_t heads[GROUP];
    int32_t first_key[GROUP], end_key[GROUP]; /* slots of the keys each query sees, but for those hidden */
    int32_t hidden, end_hidden;               /* the row's gap */
    int32_t begin, end;                       /* those that any sees, from the beginning of a chunk on */
} query_group;

typedef struct {
    const bf16 *key_tiles[CHUNK / LANES];
    const bf16 *values[CHUNK];
    int32_t first, count;
} key_chunk;

/* Softmax of a query over the chunks so far: sums of values, and of their weights, relative to the largest score. */
typedef struct {
    float sums[MAX_HEAD];
    vec weight;
    float running_max;
} softmax_state;

static inline void copy_query(query_number *to, const bf16 *query, int64_t size) {
#ifdef __AVX512BF16__
    memcpy(to, query, sizeof(bf16) * (size_t)size);
#else
    for (int64_t d = 0; d < size; d += WIDTH) store(to + d, load_bf16(query + d));
#endif
}

#ifdef SCORES_BY_TILES
/* scores[i][k] = query i . key k of a chunk. */
static void score_chunk(int64_t size, const query_group *group, const key_chunk *chunk, float (*scores)[CHUNK]) {
    score_tiles(group->queries[0], MAX_HEAD, size, chunk->key_tiles, scores[0]);
}
#else
static inline void begin_scores(int64_t num_queries) { (void)num_queries; }

/* sums + the products of numbers d and d + 1 of a query with those of WIDTH keys. */
static inline vec add_pair(vec sums, const bf16 *keys, const query_number *query, int64_t d) {
#ifdef __AVX512BF16__
    return add_pairs(sums, _mm512_loadu_si512(keys), query + d);
#else
    uvec bits = *(const uvec *)keys;
    sums += (vec)(bits << 16) * query[d];
    return sums + (vec)(bits & 0xffff0000) * query[d + 1];
#endif
}

/* scores[i][k] = query i . key k, for VECTORS vectors of keys. */
ALWAYS_INLINE void score_keys(int64_t size, int queries, const query_number (*query)[MAX_HEAD],
                              const bf16 *const *key_tiles, float (*scores)[CHUNK]) {
    enum { PER_TILE = LANES / WIDTH };
    vec sums[QUERIES][VECTORS];
    for (int i = 0; i < queries; i++)
        for (int v = 0; v < VECTORS; v++) sums[i][v] = (vec){0};
    for (int64_t d = 0; d < size; d += 2)
#pragma GCC unroll 4
        for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                const bf16 *keys = key_tiles[v / PER_TILE] + d * LANES + v % PER_TILE * 2 * WIDTH;
                sums[i][v] = add_pair(sums[i][v], keys, query[i], d);
            }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) store(scores[i] + v * WIDTH, sums[i][v]);
}

/* scores[i][k] = query i . key k of a chunk. */
static void score_chunk(int64_t size, const query_group *group, const key_chunk *chunk, float (*scores)[CHUNK]) {
    for (int64_t i = 0; i < group->count; i += QUERIES)
        for (int k = 0; k < CHUNK; k += VECTORS * WIDTH) {
            float(*part)[CHUNK] = (float(*)[CHUNK])(scores[i] + k);
            const bf16 *const *tiles = chunk->key_tiles + k / LANES;
            switch (group->count - i) {
                case 1: score_keys(size, 1, group->queries + i, tiles, part); break;
                case 2: score_keys(size, 2, group->queries + i, tiles, part); break;
                case 3: score_keys(size, 3, group->queries + i, tiles, part); break;
                default: score_keys(size, QUERIES, group->queries + i, tiles, part);
            }
        }
}
#endif

/* sums[i][d] += sum over k of weights[i][k] * values[k][d], for `vectors` vectors of sums from d on. values: of the chunk
 * in float32, [count][size]; null: as they are stored. */
ALWAYS_INLINE void add_values(int queries, int vectors, const key_chunk *chunk, const float *values, int64_t size,
                              float (*weights)[CHUNK], softmax_state *states, int64_t d) {
    vec sums[QUERIES][VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[i][v] = load(states[i].sums + d + v * WIDTH);
    for (int32_t k = 0; k < chunk->count; k++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            int64_t place = d + v * WIDTH;
            vec value = values ? load(values + k * size + place) : load_bf16(chunk->values[k] + place);
#pragma GCC unroll 4
            for (int i = 0; i < queries; i++) sums[i][v] += weights[i][k] * value;
        }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(states[i].sums + d + v * WIDTH, sums[i][v]);
}

ALWAYS_INLINE void add_all_values(int queries, const key_chunk *chunk, const float *values, int64_t size,
                                  float (*weights)[CHUNK], softmax_state *states) {
    int64_t d = 0;
    for (; d + VECTORS * WIDTH <= size; d += VECTORS * WIDTH)
        add_values(queries, VECTORS, chunk, values, size, weights, states, d);
    for (; d < size; d += WIDTH) add_values(queries, 1, chunk, values, size, weights, states, d);
}

/* add_values for all queries of a group. Values that are read more than once are cast to float32 before. */
static void add_chunk(int64_t size, const query_group *group, const key_chunk *chunk, float (*weights)[CHUNK],
                      softmax_state *states) {
    float values[CHUNK * MAX_HEAD] __attribute__((aligned(64)));
    int64_t i = 0;
    if (group->count > QUERIES)
        for (int32_t k = 0; k < chunk->count; k++)
            for (int64_t d = 0; d < size; d += WIDTH) store(values + k * size + d, load_bf16(chunk->values[k] + d));
    for (; i + QUERIES <= group->count && group->count > QUERIES; i += QUERIES)
        add_all_values(QUERIES, chunk, values, size, weights + i, states + i);
    switch (group->count - i) {
        case 1: add_all_values(1, chunk, 0, size, weights + i, states + i); break;
        case 2: add_all_values(2, chunk, 0, size, weights + i, states + i); break;
        case 3: add_all_values(3, chunk, 0, size, weights + i, states + i); break;
        case 4: add_all_values(4, chunk, 0, size, weights + i, states + i); break;
    }
}

/* Turns a query's scores of a chunk into weights, relative to the largest score so far. */
static void update_softmax(const attention *a, const query_group *group, int64_t i, const key_chunk *chunk,
                           float *scores, softmax_state *state) {
    int32_t first_key = group->first_key[i], end_key = group->end_key[i];
    int32_t hidden = group->hidden, end_hidden = group->end_hidden;
    ivec lanes;
    for (int i = 0; i < WIDTH; i++) lanes[i] = i;
    vec top = broadcast(UNSEEN);
    int sees_all = first_key <= chunk->first && end_key >= chunk->first + CHUNK &&
                   (hidden >= chunk->first + CHUNK || end_hidden <= chunk->first);
    for (int k = 0; k < CHUNK; k += WIDTH) {
        vec scaled = load(scores + k) * a->scale;
        if (a->softcap > 0) scaled = hyperbolic_tangent(scaled * (1.0f / a->softcap)) * a->softcap;
        if (!sees_all) {
            ivec position = lanes + (chunk->first + k);
            ivec is_seen = (position >= first_key) & (position < end_key) & ((position < hidden) | (position >= end_hidden));
            scaled = blend(is_seen, scaled, broadcast(UNSEEN));
        }
        store(scores + k, scaled);
        top = maximum(top, scaled);
    }
    float largest = reduce_max(top);
    if (largest > state->running_max) {
        vec rescale = exp_nonpositive(broadcast(state->running_max - largest));
        state->weight *= rescale;
        for (int64_t d = 0; d < a->size; d += WIDTH) store(state->sums + d, load(state->sums + d) * rescale);
        state->running_max = largest;
    }
    for (int k = 0; k < CHUNK; k += WIDTH) {
        vec scaled = load(scores + k);
        /* The running maximum of a query that has seen no key yet is UNSEEN too, and e^0 would count. */
        vec weights = blend(scaled > 0.5f * UNSEEN, exp_nonpositive(scaled - state->running_max), (vec){0});
        store(scores + k, weights);
        state->weight += weights;
    }
}

static key_chunk find_chunk(const attention *a, const row_span *row, int64_t kv_head, int32_t first, int32_t end) {
    const int64_t *blocks = a->block_ids + row->first_block;
    key_chunk chunk = {.first = first, .count = end - first < CHUNK ? end - first : CHUNK};
    for (int t = 0; t < CHUNK / LANES; t++) {
        int32_t position = first + (t * LANES < chunk.count ? t * LANES : 0); /* unseen ones: whatever can be read */
        int64_t block = blocks[position / a->block_size], offset = position % a->block_size;
        chunk.key_tiles[t] =
            a->keys + ((block * a->num_kv_heads + kv_head) * a->block_size + offset) * a->size;
    }
    for (int32_t k = 0; k < chunk.count; k++) {
        int64_t block = blocks[(first + k) / a->block_size], offset = (first + k) % a->block_size;
        chunk.values[k] = a->values + ((block * a->block_size + offset) * a->num_kv_heads + kv_head) * a->size;
    }
    return chunk;
}

static void attend_group(const attention *a, const row_span *row, const query_group *group) {
    softmax_state states[GROUP];
    for (int64_t i = 0; i < group->count; i++) {
        states[i].weight = (vec){0};
        states[i].weight[0] = a->sinks ? 1.0f : 0.0f; /* e^0: the sink's score is the largest so far */
        states[i].running_max = a->sinks ? a->sinks[group->heads[i]] : UNSEEN;
        memset(states[i].sums, 0, sizeof(float) * (size_t)a->size);
    }
    for (int32_t first = group->begin; first < group->end; first += CHUNK) {
        float scores[GROUP][CHUNK] __attribute__((aligned(64)));
        key_chunk chunk = find_chunk(a, row, group->kv_head, first, group->end);
        score_chunk(a->size, group, &chunk, scores);
        for (int64_t i = 0; i < group->count; i++)
            update_softmax(a, group, i, &chunk, scores[i], states + i);
        add_chunk(a->size, group, &chunk, scores, states);
    }
    for (int64_t i = 0; i < group->count; i++) {
        float factor = 1.0f / reduce_add(states[i].weight);
        for (int64_t d = 0; d < a->size; d += WIDTH) store_bf16(group->outs[i] + d, load(states[i].sums + d) * factor);
    }
}

static void make_group(const attention *a, const row_span *row, int64_t kv_head, int64_t first_query,
                       query_group *group) {
    int64_t repeat = a->num_heads / a->num_kv_heads, left = row->num_tokens * repeat - first_query;
    group->kv_head = kv_head;
    group->count = left < GROUP ? left : GROUP;
    for (int64_t i = 0; i < group->count; i++) {
        int64_t token = (first_query + i) / repeat, position = row->first_position + token;
        int64_t head = kv_head * repeat + (first_query + i) % repeat, index = row->first_index + token;
        copy_query(group->queries[i], a->query + index * a->query_stride + head * a->size, a->size);
        group->heads[i] = head;
        group->outs[i] = a->out + (index * a->num_heads + head) * a->size;
        group->end_key[i] = (int32_t)(position + row->gap + 1);
        int64_t first_key = a->window && position >= a->window ? position + 1 - a->window : 0;
        group->first_key[i] = (int32_t)(first_key < row->first_position ? first_key : first_key + row->gap);
    }
    group->hidden = row->gap ? (int32_t)row->first_position : 0;
    group->end_hidden = row->gap ? (int32_t)(row->first_position + row->gap) : 0;
    group->begin = group->first_key[0] / CHUNK * CHUNK;
    group->end = group->end_key[group->count - 1];
}

/* Work on a row: its groups of queries, for each KV head. */
static inline int64_t num_row_items(const attention *a, const row_span *row) {
    return a->num_kv_heads * ((row->num_tokens * (a->num_heads / a->num_kv_heads) + GROUP - 1) / GROUP);
}

static void attend_items(member *me, void *argument) {
    const attention *a = argument;
    for (int64_t item; (item = next_item(me)) >= 0;) {
        const row_span *row = a->rows;
        for (; item >= num_row_items(a, row); row++) item -= num_row_items(a, row);
        query_group group;
        make_group(a, row, item % a->num_kv_heads, item / a->num_kv_heads * GROUP, &group);
        begin_scores(group.count);
        attend_group(a, row, &group);
    }
    end_tiles();
}

/* From every row to its blocks. */
static void attend_rows(team *t, attention *a) {
    int64_t num_items = 0;
    for (int64_t r = 0; r < a->num_rows; r++) num_items += num_row_items(a, &a->rows[r]);
    run_items(t, num_items, attend_items, a);
}

/* Puts a token's keys and values, [num_kv_heads, size] each, into its slot (block * block_size + offset). */
static void store_kv(const attention *a, const bf16 *key, const bf16 *value, int64_t slot, bf16 *keys, bf16 *values) {
    int64_t size = a->size, width = a->num_kv_heads * size, block = slot / a->block_size, offset = slot % a->block_size;
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        bf16 *tile = keys + ((block * a->num_kv_heads + head) * a->block_size + offset / LANES * LANES) * size;
        for (int64_t d = 0; d < size; d += 2)
            memcpy(tile + d * LANES + offset % LANES * 2, key + head * size + d, 2 * sizeof(bf16));
    }
    memcpy(values + slot * width, value, sizeof(bf16) * (size_t)width);
}

/* Stores the step's keys and values in the cache, then attends. query [T, num_heads, size], key and value
 * [T, num_kv_heads, size], tokens `strides` numbers apart in each; slots [T]. */
void EXPORT(attend)(const bf16 *query, const bf16 *key, const bf16 *value, const int64_t *strides, bf16 *keys,
                    bf16 *values, const int64_t *slots, int64_t num_tokens, int64_t block_size, int64_t num_heads,
                    int64_t num_kv_heads, int64_t size, float scale, int64_t window, float softcap,
                    const float *sinks, const row_span *rows, int64_t num_rows, const int64_t *block_ids,
                    int num_threads, bf16 *out) {
    attention a = {query,     keys,         values, rows,   block_ids, out,     strides[0], num_rows, block_size,
                   num_heads, num_kv_heads, size,   window, scale,     softcap, sinks};
    for (int64_t token = 0; token < num_tokens; token++)
        store_kv(&a, key + token * strides[1], value + token * strides[2], slots[token], keys, values);
    team *t = begin_team(num_threads);
    attend_rows(t, &a);
    end_team(t);
}
