/* Causal attention over the paged KV cache, online over chunks of keys (arXiv:2205.14135). Head sizes are multiples of
 * LANES up to MAX_HEAD. A query's result does not depend on what else is in the step: its sums run in the order of the
 * keys, and chunks begin at the same positions for all queries.
 *
 * Values lie in the cache token by token, keys in tiles of LANES tokens of a block, so that one instruction multiplies
 * a pair of a query's numbers with those of LANES keys:
 *     keys   [block][num_kv_heads][block_size / LANES][size / 2][LANES][2]
 *     values [block][block_size][num_kv_heads][size]
 */

#include "kernels.h"

#define MAX_HEAD 256
#define UNSEEN (-1e30f)
#define GROUP 16         /* queries of one row that share a KV head, computed by one thread */
#define CHUNK_TILES 4
#define CHUNK (CHUNK_TILES * LANES)
#define QUERIES 4        /* whose sums are kept in registers together */
#ifdef __AVX512F__
#define VECTORS 4        /* of sums per query, likewise */
#else
#define VECTORS 1
#endif

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef struct {
    int64_t kv_head, count;
    const bf16 *queries[GROUP];
    bf16 *outs[GROUP];
    int32_t first_key[GROUP], end_key[GROUP]; /* the keys each query sees */
    int32_t begin, end;                       /* those that any sees, from the beginning of a chunk on */
} query_group;

typedef struct {
    const bf16 *key_tiles[CHUNK_TILES];
    const bf16 *values[CHUNK];
    int32_t first, count;
} key_chunk;

/* What is known of a query after some chunks. */
typedef struct {
    float sums[MAX_HEAD];
    vec weight;
    float peak;
} progress;

/* sums + the products of a pair of a query's numbers with those of LANES keys. */
static inline vec add_pair(vec sums, const bf16 *keys, const bf16 *query) {
#ifdef __AVX512BF16__
    int32_t pair;
    memcpy(&pair, query, sizeof pair);
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(keys), (__m512bh)_mm512_set1_epi32(pair));
#else
    uvec bits = *(const uvec *)keys;
    return sums + (vec)(bits << 16) * widen(query[0]) + (vec)(bits & 0xffff0000) * widen(query[1]);
#endif
}

/* scores[i][k] = query i . key k of `tiles` tiles. */
static inline __attribute__((always_inline)) void score_tiles(int64_t size, int queries, int tiles,
                                                              const bf16 *const *query, const bf16 *const *key_tiles,
                                                              float (*scores)[CHUNK]) {
    vec sums[QUERIES][VECTORS];
    for (int i = 0; i < queries; i++)
        for (int t = 0; t < tiles; t++) sums[i][t] = (vec){0};
    for (int64_t d = 0; d < size; d += 2)
#pragma GCC unroll 4
        for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
            for (int t = 0; t < tiles; t++) sums[i][t] = add_pair(sums[i][t], key_tiles[t] + d * LANES, query[i] + d);
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
        for (int t = 0; t < tiles; t++) *(vec *)(scores[i] + t * LANES) = sums[i][t];
}

/* sums[i][d] += sum over k of weights[i][k] * values[k][d], for `vectors` vectors of sums from d on. */
static inline __attribute__((always_inline)) void add_values(int queries, int vectors, const key_chunk *chunk,
                                                             float (*weights)[CHUNK], progress *states, int64_t d) {
    vec sums[QUERIES][VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[i][v] = *(vec *)(states[i].sums + d + v * LANES);
    for (int32_t k = 0; k < chunk->count; k++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            vec value = load(chunk->values[k] + d + v * LANES);
#pragma GCC unroll 4
            for (int i = 0; i < queries; i++) sums[i][v] += weights[i][k] * value;
        }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) *(vec *)(states[i].sums + d + v * LANES) = sums[i][v];
}

/* Turns a query's scores into weights, relative to the largest score so far. */
static void weigh(int64_t size, const key_chunk *chunk, int32_t first_key, int32_t end_key, float scale, float *scores,
                  progress *state) {
    static const ivec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec *tiles = (vec *)scores, top = spread(UNSEEN);
    int sees_all = first_key <= chunk->first && end_key >= chunk->first + CHUNK;
    for (int t = 0; t < CHUNK_TILES; t++) {
        tiles[t] *= scale;
        if (!sees_all) {
            ivec position = lanes + (chunk->first + t * LANES);
            ivec seen = (position >= first_key) & (position < end_key);
            tiles[t] = (vec)(((ivec)tiles[t] & seen) | ((ivec)spread(UNSEEN) & ~seen));
        }
        top = larger(top, tiles[t]);
    }
    float peak = largest(top);
    if (peak > state->peak) {
        vec fade = exponential(spread(state->peak - peak));
        state->weight *= fade;
        for (int64_t d = 0; d < size; d += LANES) *(vec *)(state->sums + d) *= fade;
        state->peak = peak;
    }
    for (int t = 0; t < CHUNK_TILES; t++) {
        /* The peak of a query that has seen no key yet is UNSEEN too, and e^0 would count. */
        tiles[t] = (vec)((ivec)exponential(tiles[t] - state->peak) & (tiles[t] > 0.5f * UNSEEN));
        state->weight += tiles[t];
    }
}

/* Attention of QUERIES or fewer of a group to one chunk. */
static inline __attribute__((always_inline)) void attend_some(const attention *a, const query_group *group,
                                                              const key_chunk *chunk, int64_t first, int queries,
                                                              progress *states) {
    float scores[QUERIES][CHUNK];
    for (int t = 0; t < CHUNK_TILES; t += VECTORS) {
        float(*part)[CHUNK] = (float(*)[CHUNK])(scores[0] + t * LANES);
        score_tiles(a->size, queries, VECTORS, group->queries + first, chunk->key_tiles + t, part);
    }
    for (int i = 0; i < queries; i++)
        weigh(a->size, chunk, group->first_key[first + i], group->end_key[first + i], a->scale, scores[i],
              states + first + i);
    int64_t d = 0;
    for (; d + VECTORS * LANES <= a->size; d += VECTORS * LANES)
        add_values(queries, VECTORS, chunk, scores, states + first, d);
    for (; d < a->size; d += LANES) add_values(queries, 1, chunk, scores, states + first, d);
}

static key_chunk find_chunk(const attention *a, const row_span *row, int64_t kv_head, int32_t first, int32_t end) {
    const int64_t *blocks = a->block_ids + row->first_block;
    key_chunk chunk = {.first = first, .count = end - first < CHUNK ? end - first : CHUNK};
    for (int t = 0; t < CHUNK_TILES; t++) {
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
    progress states[GROUP];
    for (int64_t i = 0; i < group->count; i++) {
        states[i].weight = (vec){0};
        states[i].peak = UNSEEN;
        memset(states[i].sums, 0, sizeof(float) * (size_t)a->size);
    }
    for (int32_t first = group->begin; first < group->end; first += CHUNK) {
        key_chunk chunk = find_chunk(a, row, group->kv_head, first, group->end);
        int64_t i = 0;
        for (; i + QUERIES <= group->count; i += QUERIES) attend_some(a, group, &chunk, i, QUERIES, states);
        switch (group->count - i) {
            case 3: attend_some(a, group, &chunk, i, 3, states); break;
            case 2: attend_some(a, group, &chunk, i, 2, states); break;
            case 1: attend_some(a, group, &chunk, i, 1, states); break;
        }
    }
    for (int64_t i = 0; i < group->count; i++) {
        float factor = 1.0f / sum(states[i].weight);
        for (int64_t d = 0; d < a->size; d += LANES) store(group->outs[i] + d, *(vec *)(states[i].sums + d) * factor);
    }
}

static query_group make_group(const attention *a, const row_span *row, int64_t kv_head, int64_t first_query) {
    int64_t repeat = a->num_heads / a->num_kv_heads, left = row->num_tokens * repeat - first_query;
    query_group group = {.kv_head = kv_head, .count = left < GROUP ? left : GROUP};
    for (int64_t i = 0; i < group.count; i++) {
        int64_t token = (first_query + i) / repeat, position = row->first_position + token;
        int64_t head = kv_head * repeat + (first_query + i) % repeat, index = row->first_index + token;
        group.queries[i] = a->query + index * a->query_stride + head * a->size;
        group.outs[i] = a->out + (index * a->num_heads + head) * a->size;
        group.end_key[i] = (int32_t)(position + 1);
        group.first_key[i] = a->window && position >= a->window ? (int32_t)(position + 1 - a->window) : 0;
    }
    group.begin = group.first_key[0] / CHUNK * CHUNK;
    group.end = group.end_key[group.count - 1];
    return group;
}

/* Of a team: from every row to its blocks. */
void attend_rows(const attention *a) {
    for (int64_t r = 0; r < a->num_rows; r++) {
        const row_span *row = &a->rows[r];
        int64_t num_groups = (row->num_tokens * (a->num_heads / a->num_kv_heads) + GROUP - 1) / GROUP;
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = 0; item < a->num_kv_heads * num_groups; item++) {
            query_group group = make_group(a, row, item % a->num_kv_heads, item / a->num_kv_heads * GROUP);
            attend_group(a, row, &group);
        }
    }
}

/* Puts a token's keys and values, [num_kv_heads, size] each, into its slot (block * block_size + offset). */
void store_token(const attention *a, const bf16 *key, const bf16 *value, int64_t slot, bf16 *keys, bf16 *values) {
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
void cllm_attend(const bf16 *query, const bf16 *key, const bf16 *value, const int64_t *strides, bf16 *keys,
                 bf16 *values, const int64_t *slots, int64_t num_tokens, int64_t block_size, int64_t num_heads,
                 int64_t num_kv_heads, int64_t size, float scale, int64_t window, const row_span *rows,
                 int64_t num_rows, const int64_t *block_ids, int num_threads, bf16 *out) {
    attention a = {query,    keys,       values,    rows,         block_ids, out,    strides[0],
                   num_rows, block_size, num_heads, num_kv_heads, size,      window, scale};
    for (int64_t token = 0; token < num_tokens; token++)
        store_token(&a, key + token * strides[1], value + token * strides[2], slots[token], keys, values);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    attend_rows(&a);
}
