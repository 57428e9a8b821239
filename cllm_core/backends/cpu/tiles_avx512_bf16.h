/* Tiles by the dot products of AVX512-BF16 and AVX512-VNNI; processors with the former have the latter too. */

#include "kernels.h"

#include <immintrin.h>

#define BF16_ROWS 12

typedef bf16 bf16_input;

static inline void begin_tiles(int64_t num_tokens) { (void)num_tokens; }
static inline void end_tiles(void) {}

ALWAYS_INLINE void dot_panel(const bf16 *x, const bf16 *panel, prefetch how, int64_t num_in, int rows, float *out) {
    __m512 sums[BF16_ROWS][2];
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < num_in; k += 2, panel += 2 * PANEL) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(panel), last = (__m512bh)_mm512_loadu_si512(panel + PANEL);
        prefetch_weights(panel, how);
        prefetch_weights(panel + PANEL, how);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            int32_t pair;
            memcpy(&pair, x + i * num_in + k, sizeof pair);
            __m512bh pairs = (__m512bh)_mm512_set1_epi32(pair);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], first, pairs);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], last, pairs);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        _mm512_storeu_ps(out + i * PANEL, sums[i][0]);
        _mm512_storeu_ps(out + i * PANEL + LANES, sums[i][1]);
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
