/* What is left of a bfloat16 decoder step beside its matrix products: norm, rotary embedding, attention over the paged
 * KV cache; and the output layer, whose logits keep float32. Numbers are read as bfloat16 and computed as float32.
 *
 * Plain C with the vector types of GCC and Clang, so that one source serves AVX2, AVX-512 and NEON. Head sizes are
 * multiples of 16 up to 256. Called through ctypes (cllm_core/models/native/kernels.py), which checks shapes.
 */

#include <stdint.h>
#include <string.h>

#define LANES 16      /* of a vector; in attention: queries computed together, one per lane */
#define KEY_CHUNK 64  /* keys and values widened at once, so that they stay in the first cache */
#define TILE 8        /* sums kept in registers; divides KEY_CHUNK and head sizes */
#define MAX_HEAD 256
#define UNSEEN (-1e30f)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t bf16;
typedef uint16_t bvec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  /* to nearest, ties to even */
}

static inline vec load(const bf16 *x) {
    uvec bits = __builtin_convertvector(*(const bvec *)x, uvec) << 16;
    return (vec)bits;
}

static inline void store(bf16 *x, vec value) {
    uvec bits = (uvec)value;
    *(bvec *)x = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, bvec);
}

static inline vec spread(float x) { return x - (vec){0}; }

static inline float sum(vec x) {
    vec8 low, high;
    memcpy(&low, &x, sizeof low);
    memcpy(&high, (const char *)&x + sizeof low, sizeof high);
    low += high;
    vec4 first, last;
    memcpy(&first, &low, sizeof first);
    memcpy(&last, (const char *)&low + sizeof first, sizeof last);
    first += last;
    return first[0] + first[2] + (first[1] + first[3]);
}

static inline vec larger(vec x, vec y) {
    ivec above = x > y;
    return (vec)(((ivec)x & above) | ((ivec)y & ~above));
}

/* e^x for x <= 0: 2^n * p(r), relative error below 1e-7 * 2; 0 below -87. */
static inline vec exponential(vec x) {
    ivec tiny = x < -87.0f;
    vec scaled = x * 1.44269504f;
    ivec n = __builtin_convertvector(scaled - 0.5f, ivec);  /* towards 0: rounds to nearest, as x <= 0 */
    vec whole = __builtin_convertvector(n, vec);
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = 1.9875691500e-4f + r * (vec){0};
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec power = (vec)((n + 127) << 23);
    return (vec)((ivec)(p * power) & ~tiny);
}

/* out[i] = x[i] / rms(x[i]) * weight for num_rows rows of `size` numbers, `stride` apart in x. */
void cllm_rms_norm(const bf16 *x, int64_t stride, const bf16 *weight, float epsilon, int64_t num_rows, int64_t size,
                   bf16 *out) {
    for (int64_t row = 0; row < num_rows; row++) {
        const bf16 *in = x + row * stride;
        vec squares = {0};
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) squares += load(in + i) * load(in + i);
        float total = sum(squares);
        for (; i < size; i++) total += widen(in[i]) * widen(in[i]);
        float factor = 1.0f / __builtin_sqrtf(total / (float)size + epsilon);
        for (i = 0; i + LANES <= size; i += LANES) store(out + row * size + i, load(in + i) * factor * load(weight + i));
        for (; i < size; i++) out[row * size + i] = narrow(widen(in[i]) * factor * widen(weight[i]));
    }
}

/* In place: heads * cos + rotate_half(heads) * sin. heads [num_tokens, num_heads, size], tokens `stride` apart;
 * cos, sin [num_tokens, size]. */
void cllm_rotate(bf16 *heads, int64_t stride, const bf16 *cos, const bf16 *sin, int64_t num_tokens, int64_t num_heads,
                 int64_t size) {
    int64_t half = size / 2;
    for (int64_t token = 0; token < num_tokens; token++) {
        const bf16 *c = cos + token * size, *s = sin + token * size;
        for (int64_t head = 0; head < num_heads; head++) {
            bf16 *low = heads + token * stride + head * size, *high = low + half;
            for (int64_t i = 0; i < half; i += LANES) {
                if (i + LANES <= half) {
                    vec a = load(low + i), b = load(high + i);
                    store(low + i, a * load(c + i) - b * load(s + i));
                    store(high + i, b * load(c + half + i) + a * load(s + half + i));
                    continue;
                }
                for (int64_t j = i; j < half; j++) {
                    float a = widen(low[j]), b = widen(high[j]);
                    low[j] = narrow(a * widen(c[j]) - b * widen(s[j]));
                    high[j] = narrow(b * widen(c[half + j]) + a * widen(s[half + j]));
                }
            }
        }
    }
}

/* One row of the step, as cllm_core.models.native.kernels writes it. */
typedef struct {
    int64_t first_index;     /* of the step's tokens */
    int64_t num_tokens;
    int64_t first_position;
    int64_t first_block;     /* where the row's blocks begin in block_ids */
} row_span;

typedef struct {
    const bf16 *query;       /* [T, num_heads, size], tokens query_stride apart */
    const bf16 *keys;        /* [slots, num_kv_heads, size] */
    const bf16 *values;
    const int64_t *block_ids;
    bf16 *out;               /* [T, num_heads, size] */
    int64_t query_stride, block_size, num_heads, num_kv_heads, size, window;
    float scale;
} attention;

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
    group.begin = group.first_key[0];
    group.end = group.end_key[LANES - 1];
    return group;
}

/* Stores the step's keys and values in the cache, then attends causally from every row to its blocks.
 * query [T, num_heads, size], key and value [T, num_kv_heads, size], tokens `stride` numbers apart in each;
 * slots [T]: block * block_size + offset. window: a token sees itself and the window - 1 tokens before it; 0: all. */
void cllm_attend(const bf16 *query, const bf16 *key, const bf16 *value, const int64_t *strides, bf16 *keys,
                 bf16 *values, const int64_t *slots, int64_t num_tokens, int64_t block_size, int64_t num_heads,
                 int64_t num_kv_heads, int64_t size, float scale, int64_t window, const row_span *rows,
                 int64_t num_rows, const int64_t *block_ids, int num_threads, bf16 *out) {
    int64_t width = num_kv_heads * size;
    for (int64_t token = 0; token < num_tokens; token++) {
        memcpy(keys + slots[token] * width, key + token * strides[1], sizeof(bf16) * (size_t)width);
        memcpy(values + slots[token] * width, value + token * strides[2], sizeof(bf16) * (size_t)width);
    }
    attention a = {query,     keys,         values, block_ids, out,   strides[0], block_size,
                   num_heads, num_kv_heads, size,   window,    scale};
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t num_groups = (rows[r].num_tokens * (num_heads / num_kv_heads) + LANES - 1) / LANES;
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = 0; item < num_kv_heads * num_groups; item++) {
            lane_group group = make_group(&a, &rows[r], item % num_kv_heads, item / num_kv_heads * LANES);
            attend_group(&a, &rows[r], &group);
        }
    }
}

/* Whether this library can compute logits (cllm_project). */
int cllm_can_project(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512BF16__
#include <immintrin.h>

#define PAIRED 32       /* numbers that one instruction multiplies and adds up in pairs */
#define TILE_ROWS 4     /* tokens and vocabulary entries whose products are summed in registers */
#define TILE_ENTRIES 4
#define BLOCK_ROWS 16   /* tokens and vocabulary entries that stay in the first and the second cache */
#define BLOCK_ENTRIES 64

/* The sum of each of four vectors. */
static inline __m128 sum_each(const __m512 *x) {
    __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    __m512 last = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(first, last, 0x44), _mm512_shuffle_ps(first, last, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* out[i][j] = x[i] . weight[j]. Sums run in the same order whatever the tile, so that a logit does not depend on what
 * else is in the step. */
static inline __attribute__((always_inline)) void project_tile(const bf16 *x, const bf16 *weight, int64_t size,
                                                               int rows, int64_t vocab, float *out) {
    __m512 sums[TILE_ROWS][TILE_ENTRIES];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < TILE_ENTRIES; j++) sums[i][j] = _mm512_setzero_ps();
    for (int64_t d = 0; d < size; d += PAIRED) {
        __m512bh columns[TILE_ENTRIES];
#pragma GCC unroll 4
        for (int j = 0; j < TILE_ENTRIES; j++) columns[j] = (__m512bh)_mm512_loadu_si512(weight + j * size + d);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            __m512bh row = (__m512bh)_mm512_loadu_si512(x + i * size + d);
#pragma GCC unroll 4
            for (int j = 0; j < TILE_ENTRIES; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], row, columns[j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) _mm_storeu_ps(out + i * vocab, sum_each(sums[i]));
}

static void project_block(const bf16 *x, const bf16 *weight, int64_t size, int64_t rows, int64_t entries,
                          int64_t vocab, float *out) {
    for (int64_t v = 0; v < entries; v += TILE_ENTRIES) {
        int64_t r = 0;
        for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
            project_tile(x + r * size, weight + v * size, size, TILE_ROWS, vocab, out + r * vocab + v);
        for (; r < rows; r++) project_tile(x + r * size, weight + v * size, size, 1, vocab, out + r * vocab + v);
    }
}

/* Logits: out [num_rows, vocab] of x [num_rows, size] and weight [vocab, size]; size is a multiple of PAIRED, vocab of
 * TILE_ENTRIES. */
void cllm_project(const bf16 *x, const bf16 *weight, int64_t num_rows, int64_t size, int64_t vocab, int num_threads,
                  float *out) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t v = 0; v < vocab; v += BLOCK_ENTRIES) {
        int64_t entries = vocab - v < BLOCK_ENTRIES ? vocab - v : BLOCK_ENTRIES;
        for (int64_t r = 0; r < num_rows; r += BLOCK_ROWS) {
            int64_t rows = num_rows - r < BLOCK_ROWS ? num_rows - r : BLOCK_ROWS;
            project_block(x + r * size, weight + v * size, size, rows, entries, vocab, out + r * vocab + v);
        }
    }
}
#endif
