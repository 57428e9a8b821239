/* Tiles by AMX: one instruction multiplies up to 16 tokens by 16 outputs of a panel, 32 inputs in bfloat16 or 64 in 8
 * bits. A panel is what the instruction wants: its rows are pairs (or fours) of inputs of all outputs.
 *
 * Tiles 0 to 3 are sums [tokens 0-15, tokens 16-31] x [outputs 0-15, outputs 16-31], 4 and 5 inputs, 6 and 7 weights.
 * The compiler does not know what the instructions read and write; `memory_barrier` keeps its own stores in order.
 */

#include "kernels.h"

#include <immintrin.h>

#define TILE_ROWS 16
#define BF16_ROWS (2 * TILE_ROWS)
#define INT8_ROWS (2 * TILE_ROWS)
#define TILE_BYTES 64 /* of a row of most tiles */
#define GROUPS_AT_ONCE 4 /* of 8-bit weights: multiplied by tiles, then scaled by vectors */
#define ROWS_AT_ONCE 8   /* whose sums are kept in registers while they are scaled */
#define PANEL_STRIDE 128 /* bytes from a pair or four of inputs to the next, in a panel and in sums */

typedef bf16 bf16_input;

static int64_t rows_per_tile(int64_t num_tokens, int64_t most_rows);

static inline void memory_barrier(void) { __asm__ volatile("" : : : "memory"); }

/* Tokens of the first tile of inputs; the others are in the second. */
static inline int64_t first_rows(int64_t rows) { return rows > TILE_ROWS ? (rows + 1) / 2 : rows; }

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

static inline void configure(const int64_t *rows, const int64_t *row_bytes) {
    tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)rows[i];
        config.row_bytes[i] = rows[i] ? (uint16_t)row_bytes[i] : 0;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

static inline void begin_tiles(int64_t num_tokens) {
    int64_t all = rows_per_tile(num_tokens, BF16_ROWS), first = first_rows(all), second = all - first;
    int64_t rows[] = {first, first, second, second, first, second, TILE_ROWS, TILE_ROWS};
    int64_t row_bytes[] = {64, 64, 64, 64, 64, 64, 64, 64};
    configure(rows, row_bytes);
}

static inline void end_tiles(void) { _tile_release(); }

static inline void zero_sums(int has_second) {
    _tile_zero(0);
    _tile_zero(1);
    if (!has_second) return;
    _tile_zero(2);
    _tile_zero(3);
}

static inline void store_sums(int64_t rows, int has_second, void *out) {
    char *first = out, *second = first + first_rows(rows) * PANEL_STRIDE;
    _tile_stored(0, first, PANEL_STRIDE);
    _tile_stored(1, first + TILE_BYTES, PANEL_STRIDE);
    if (has_second) {
        _tile_stored(2, second, PANEL_STRIDE);
        _tile_stored(3, second + TILE_BYTES, PANEL_STRIDE);
    }
    memory_barrier();
}

static inline void prefetch_rows(const void *rows, prefetch how) {
    if (how == PREFETCH_NOTHING) return;
#pragma GCC unroll 32
    for (int i = 0; i < 2 * TILE_ROWS; i++) prefetch_weights((const char *)rows + i * TILE_BYTES, how);
}

/* sums += inputs of up to two tiles, `stride` bytes from token to token, times INPUT_UNIT inputs of a panel. */
ALWAYS_INLINE void add_bf16(const bf16 *first, const bf16 *second, int64_t stride, const bf16 *panel, int has_second) {
    _tile_loadd(4, first, stride);
    _tile_loadd(6, panel, PANEL_STRIDE);
    _tile_loadd(7, panel + PANEL, PANEL_STRIDE);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (has_second) {
        _tile_loadd(5, second, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

ALWAYS_INLINE void bf16_rows(const bf16 *x, const bf16 *panel, prefetch how, int64_t num_in, int rows, int has_second,
                             float *out) {
    int64_t stride = num_in * (int64_t)sizeof(bf16), k = 0;
    const bf16 *second = x + first_rows(rows) * num_in;
    memory_barrier();
    zero_sums(has_second);
    for (; k + INPUT_UNIT <= num_in; k += INPUT_UNIT, panel += INPUT_UNIT * PANEL) {
        prefetch_rows(panel, how);
        add_bf16(x + k, second + k, stride, panel, has_second);
    }
    if (k < num_in) { /* what is left of each token, with zeros behind it */
        bf16 rest[BF16_ROWS][INPUT_UNIT] = {0};
        for (int i = 0; i < rows; i++) memcpy(rest[i], x + i * num_in + k, (size_t)(num_in - k) * sizeof(bf16));
        memory_barrier();
        add_bf16(rest[0], rest[first_rows(rows)], sizeof rest[0], panel, has_second);
    }
    store_sums(rows, has_second, out);
}

static void bf16_tile(const bf16_input *x, const bf16 *panel, prefetch how, int64_t num_in, int rows, float *out) {
    if (rows > TILE_ROWS)
        bf16_rows(x, panel, how, num_in, rows, 1, out);
    else
        bf16_rows(x, panel, how, num_in, rows, 0, out);
}

/* sums [rows][PANEL] of inputs of up to two tiles, `stride` bytes from token to token, times a group of weights. */
ALWAYS_INLINE void multiply_int8(const int8_t *x, int64_t stride, const weight_group *group, int rows, int has_second,
                                 int32_t (*sums)[PANEL]) {
    zero_sums(has_second);
    _tile_loadd(4, x, stride);
    _tile_loadd(6, group->numbers, PANEL_STRIDE);
    _tile_loadd(7, group->numbers[0] + LANES, PANEL_STRIDE);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if (has_second) {
        _tile_loadd(5, x + first_rows(rows) * stride, stride);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    store_sums(rows, has_second, sums);
}

/* out [ROWS_AT_ONCE][PANEL] += sums of GROUPS_AT_ONCE or fewer groups, in turn, times the scales of weights and inputs. */
ALWAYS_INLINE void add_scaled(const int8_t *x, int64_t num_groups, const weight_group *panel, int64_t first, int count,
                              int rows, int32_t (*sums)[INT8_ROWS][PANEL], float *out) {
    int64_t stride = int8_row_bytes(num_groups);
    __m512 totals[ROWS_AT_ONCE][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < 2; v++) totals[i][v] = _mm512_loadu_ps(out + i * PANEL + v * LANES);
    for (int g = 0; g < count; g++) {
        vec scales[2] = {load_bf16(panel[first + g].scales), load_bf16(panel[first + g].scales + LANES)};
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            float scale = input_scales(x + i * stride, num_groups)[first + g];
            for (int v = 0; v < 2; v++) {
                __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums[g][i] + v * LANES));
                totals[i][v] = _mm512_fmadd_ps(sum, (__m512)(scales[v] * scale), totals[i][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(out + i * PANEL + v * LANES, totals[i][v]);
}

ALWAYS_INLINE void int8_rows(const int8_t *x, const weight_group *panel, prefetch how, int64_t num_groups, int rows,
                             int has_second, float *out) {
    int64_t stride = int8_row_bytes(num_groups);
    int32_t sums[GROUPS_AT_ONCE][INT8_ROWS][PANEL] __attribute__((aligned(64)));
    memset(out, 0, sizeof(float) * PANEL * (size_t)rows);
    memory_barrier();
    for (int64_t first = 0; first < num_groups; first += GROUPS_AT_ONCE) {
        int count = num_groups - first < GROUPS_AT_ONCE ? (int)(num_groups - first) : GROUPS_AT_ONCE;
        for (int64_t g = first; g < first + count; g++) {
            multiply_int8(x + g * INT8_GROUP, stride, panel + g, rows, has_second, sums[g - first]);
            prefetch_rows(panel + g, how);
            if (how != PREFETCH_NOTHING) prefetch_weights(panel[g].scales, how);
        }
        int i = 0;
        for (; i + ROWS_AT_ONCE <= rows; i += ROWS_AT_ONCE)
            add_scaled(x + i * stride, num_groups, panel, first, count, ROWS_AT_ONCE,
                       (int32_t(*)[INT8_ROWS][PANEL])sums[0][i], out + i * PANEL);
        for (; i < rows; i++)
            add_scaled(x + i * stride, num_groups, panel, first, count, 1, (int32_t(*)[INT8_ROWS][PANEL])sums[0][i],
                       out + i * PANEL);
    }
}

static void int8_tile(const int8_t *x, const weight_group *panel, prefetch how, int64_t num_groups, int rows,
                      float *out) {
    if (rows > TILE_ROWS)
        int8_rows(x, panel, how, num_groups, rows, 1, out);
    else
        int8_rows(x, panel, how, num_groups, rows, 0, out);
}

#define SCORES_BY_TILES

/* For score_tiles. Tiles 0 to 3 are scores with LANES keys each, 4 queries, 6 keys, of 32 numbers; 5 and 7 of the last 16
 * where the size of a head has a rest. */
static inline void begin_scores(int64_t num_queries) {
    int64_t rows[] = {num_queries, num_queries, num_queries, num_queries, num_queries, num_queries, 16, 8};
    int64_t row_bytes[] = {64, 64, 64, 64, 64, 32, 64, 64};
    configure(rows, row_bytes);
}

/* scores [num_queries][4 LANES] of queries, `stride` numbers apart, with the keys of four tiles [size / 2][LANES][2]. */
static inline void score_tiles(const bf16 *queries, int64_t stride, int64_t size, const bf16 *const *key_tiles,
                               float *scores) {
    int64_t query_bytes = stride * (int64_t)sizeof(bf16), key_bytes = 2 * LANES * (int64_t)sizeof(bf16), d = 0;
    int64_t score_bytes = 4 * LANES * (int64_t)sizeof(float);
#define SCORE(sum, query, key) \
    _tile_loadd(key, key_tiles[sum] + d * LANES, key_bytes); \
    _tile_dpbf16ps(sum, query, key);
    memory_barrier();
    zero_sums(1);
    for (; d + 32 <= size; d += 32) {
        _tile_loadd(4, queries + d, query_bytes);
        SCORE(0, 4, 6) SCORE(1, 4, 6) SCORE(2, 4, 6) SCORE(3, 4, 6)
    }
    if (d < size) {
        _tile_loadd(5, queries + d, query_bytes);
        SCORE(0, 5, 7) SCORE(1, 5, 7) SCORE(2, 5, 7) SCORE(3, 5, 7)
    }
#undef SCORE
    _tile_stored(0, scores, score_bytes);
    _tile_stored(1, scores + LANES, score_bytes);
    _tile_stored(2, scores + 2 * LANES, score_bytes);
    _tile_stored(3, scores + 3 * LANES, score_bytes);
    memory_barrier();
}
