/* Causal attention over the paged KV cache, up to LANES queries at a time, one per lane. Head sizes are multiples of
 * LANES up to MAX_HEAD. A query's result does not depend on what else is in the step. */

#include "kernels.h"

#define KEY_CHUNK 64 /* keys and values widened at once, so that they stay in the first cache */
#define TILE 8       /* sums kept in registers; divides KEY_CHUNK and head sizes */
#define MAX_HEAD 256
#define UNSEEN (-1e30f)

/* Up to LANES queries of one row that share a KV head; lane i sees keys first_key[i]..end_key[i] - 1. */
typedef struct {
    int64_t kv_head, count;
    int64_t places[LANES];  /* token * num_heads + head */
    ivec first_key, end_key;
    int64_t begin, end;     /* keys that any lane sees */
} lane_group;

/* Keys or values of `count` positions from `first` on, as float32 [count][size]; zeros up to a multiple of TILE. */
static void widen_chunk(const attention *a, const row_span *row, const bf16 *cache, int64_t kv_head, int64_t first,
                        int64_t count, float *out) {
    const int64_t *blocks = a->block_ids + row->first_block;
    int64_t block = first / a->block_size, offset = first % a->block_size, size = a->size;
    for (int64_t k = 0; k < count; k++, out += size) {
        const bf16 *in = cache + ((blocks[block] * a->block_size + offset) * a->num_kv_heads + kv_head) * size;
        for (int64_t d = 0; d < size; d += LANES) *(vec *)(out + d) = load(in + d);
        if (++offset == a->block_size) offset = 0, block++;
    }
    for (int64_t k = count; k % TILE; k++, out += size) memset(out, 0, sizeof(float) * (size_t)size);
}

/* scores[k] = query . keys[k] for every lane; a lane's unseen keys get UNSEEN. Returns the largest of these and peak. */
static vec score_chunk(int64_t size, const vec *query, const float *keys, const lane_group *group, int64_t first,
                       int64_t count, vec peak, vec *scores) {
    for (int64_t k = 0; k < count; k += TILE) {
        vec sums[TILE] = {{0}};
        for (int64_t d = 0; d < size; d++)
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++) sums[i] += query[d] * keys[(k + i) * size + d];
        for (int i = 0; i < TILE; i++) {
            int32_t position = (int32_t)(first + k + i);
            ivec seen = (group->first_key <= position) & (group->end_key > position);
            scores[k + i] = (vec)(((ivec)sums[i] & seen) | ((ivec)spread(UNSEEN) & ~seen));
            peak = larger(scores[k + i], peak);
        }
    }
    return peak;
}

/* sums[d] += scores[k] * values[k][d] over k, for every lane. */
static void add_values(int64_t size, const vec *scores, const float *values, int64_t count, vec *sums) {
    for (int64_t d = 0; d < size; d += TILE) {
        vec tile[TILE];
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) tile[i] = sums[d + i];
        for (int64_t k = 0; k < count; k++)
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++) tile[i] += scores[k] * values[k * size + d + i];
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) sums[d + i] = tile[i];
    }
}

/* Attention of a group, online over chunks of keys (arXiv:2205.14135). */
static void attend_group(const attention *a, const row_span *row, const lane_group *group) {
    vec query[MAX_HEAD], sums[MAX_HEAD], scores[KEY_CHUNK], peak = spread(UNSEEN), weight = {0};
    float chunk[KEY_CHUNK * MAX_HEAD];
    for (int64_t d = 0; d < a->size; d++) sums[d] = (vec){0};
    for (int lane = 0; lane < LANES; lane++) {
        int64_t place = group->places[lane];
        const bf16 *in = a->query + place / a->num_heads * a->query_stride + place % a->num_heads * a->size;
        for (int64_t d = 0; d < a->size; d++) query[d][lane] = widen(in[d]) * a->scale;
    }
    for (int64_t first = group->begin; first < group->end; first += KEY_CHUNK) {
        int64_t count = group->end - first < KEY_CHUNK ? group->end - first : KEY_CHUNK;
        widen_chunk(a, row, a->keys, group->kv_head, first, count, chunk);
        vec new_peak = score_chunk(a->size, query, chunk, group, first, count, peak, scores);
        vec fade = exponential(peak - new_peak);
        weight *= fade;
        for (int64_t k = 0; k < count; k++) {
            vec grown = exponential(scores[k] - new_peak);
            /* The peak of a lane that has seen no key yet is UNSEEN too, and e^0 would count. */
            scores[k] = (vec)((ivec)grown & (scores[k] > 0.5f * UNSEEN));
            weight += scores[k];
        }
        for (int64_t d = 0; d < a->size; d++) sums[d] *= fade;
        widen_chunk(a, row, a->values, group->kv_head, first, count, chunk);
        add_values(a->size, scores, chunk, count, sums);
        peak = new_peak;
    }
    for (int64_t lane = 0; lane < group->count; lane++)
        for (int64_t d = 0; d < a->size; d++)
            a->out[group->places[lane] * a->size + d] = narrow(sums[d][lane] / weight[lane]);
}

static lane_group make_group(const attention *a, const row_span *row, int64_t kv_head, int64_t first_query) {
    int64_t repeat = a->num_heads / a->num_kv_heads, left = row->num_tokens * repeat - first_query;
    lane_group group = {.kv_head = kv_head, .count = left < LANES ? left : LANES};
    for (int lane = 0; lane < LANES; lane++) {
        int64_t query = first_query + (lane < group.count ? lane : group.count - 1);
        int64_t token = query / repeat, position = row->first_position + token;
        group.places[lane] = (row->first_index + token) * a->num_heads + kv_head * repeat + query % repeat;
        group.end_key[lane] = (int32_t)(position + 1);
        group.first_key[lane] = a->window && position >= a->window ? (int32_t)(position + 1 - a->window) : 0;
    }
    group.begin = group.first_key[0] / KEY_CHUNK * KEY_CHUNK; /* chunks are the same for all groups: so is rounding */
    group.end = group.end_key[LANES - 1];
    return group;
}

/* Of a team: from every row to its blocks. */
void attend_rows(const attention *a) {
    for (int64_t r = 0; r < a->num_rows; r++) {
        const row_span *row = &a->rows[r];
        int64_t num_groups = (row->num_tokens * (a->num_heads / a->num_kv_heads) + LANES - 1) / LANES;
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = 0; item < a->num_kv_heads * num_groups; item++) {
            lane_group group = make_group(a, row, item % a->num_kv_heads, item / a->num_kv_heads * LANES);
            attend_group(a, row, &group);
        }
    }
}

/* Puts a token's keys and values, `width` numbers each, into its slot (block * block_size + offset) of the cache. */
void store_token(const bf16 *key, const bf16 *value, int64_t slot, int64_t width, bf16 *keys, bf16 *values) {
    memcpy(keys + slot * width, key, sizeof(bf16) * (size_t)width);
    memcpy(values + slot * width, value, sizeof(bf16) * (size_t)width);
}

/* Stores the step's keys and values in the cache, then attends. query [T, num_heads, size], key and value
 * [T, num_kv_heads, size], tokens `strides` numbers apart in each; slots [T]. */
void cllm_attend(const bf16 *query, const bf16 *key, const bf16 *value, const int64_t *strides, bf16 *keys,
                 bf16 *values, const int64_t *slots, int64_t num_tokens, int64_t block_size, int64_t num_heads,
                 int64_t num_kv_heads, int64_t size, float scale, int64_t window, const row_span *rows,
                 int64_t num_rows, const int64_t *block_ids, int num_threads, bf16 *out) {
    for (int64_t token = 0; token < num_tokens; token++)
        store_token(key + token * strides[1], value + token * strides[2], slots[token], num_kv_heads * size, keys,
                    values);
    attention a = {query,    keys,       values,    rows,         block_ids, out,    strides[0],
                   num_rows, block_size, num_heads, num_kv_heads, size,      window, scale};
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    attend_rows(&a);
}
