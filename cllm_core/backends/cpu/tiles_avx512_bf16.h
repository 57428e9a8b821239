/* Tiles by the dot products of AVX512-BF16 and AVX512-VNNI; processors with the former have the latter too. */

#include "kernels.h"

#include <immintrin.h>

#define BF16_ROWS 12

typedef bf16 bf16_input;

static inline void begin_tiles(int64_t num_tokens) { (void)num_tokens; }
static inline void end_tiles(void) {}

/* sums + products of two bfloat16 numbers each. Clang 16 crashes over the intrinsic's type. */
ALWAYS_INLINE vec add_pairs(vec sums, __m512i pairs, const bf16 *inputs) {
    int32_t pair;
    memcpy(&pair, inputs, sizeof pair);
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(pairs), "v"(_mm512_set1_epi32(pair)));
    return sums;
}

ALWAYS_INLINE void dot_panel(const bf16 *x, const bf16 *panel, prefetch how, int64_t num_in, int rows, float *out) {
    vec sums[BF16_ROWS][2];
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (vec){0};
    for (int64_t k = 0; k < num_in; k += 2, panel += 2 * PANEL) {
        __m512i first = _mm512_loadu_si512(panel), last = _mm512_loadu_si512(panel + PANEL);
        prefetch_weights(panel, how);
        prefetch_weights(panel + PANEL, how);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            sums[i][0] = add_pairs(sums[i][0], first, x + i * num_in + k);
            sums[i][1] = add_pairs(sums[i][1], last, x + i * num_in + k);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        store(out + i * PANEL, sums[i][0]);
        store(out + i * PANEL + LANES, sums[i][1]);
    }
}

static void bf16_tile(const bf16_input *x, const bf16 *panel, prefetch how, int64_t num_in, int rows, float *out) {
#define ROWS(n) \
    case n: \
        dot_panel(x, panel, how, num_in, n, out); \
        break;
    switch (rows) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
    }
#undef ROWS
}

#include "tiles_avx512_int8.h"

static void int8_tile(const int8_t *x, const weight_group *panel, prefetch how, int64_t num_groups, int rows,
                      float *out) {
    int8_tile_vnni(x, panel, how, num_groups, rows, out);
}
