/* Tiles by AVX2 and FMA; of 8-bit numbers by the dot products of AVX-VNNI where the processor has them. Both ways of the
 * latter are exact. */

#include "kernels.h"

#include <immintrin.h>

#define BF16_ROWS 6
#define WHOLE_PANEL_ROWS 2
#define INT8_ROWS 4
#define INT8_COLUMNS 16 /* of a panel at a time */

#include "tiles_fma.h"

static inline void begin_tiles(int64_t num_tokens) { (void)num_tokens; }
static inline void end_tiles(void) {}

/* sums += products of four weights and four inputs each. The intrinsic takes a compiler newer than the instruction's
 * assembler does. */
ALWAYS_INLINE void add_fours_vnni(__m256i *sums, __m256i weights, __m256i inputs) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(*sums) : "x"(weights), "x"(inputs));
}

/* The same by absolute values of weights, times inputs of their signs: in pairs these fit into 16 bits. */
ALWAYS_INLINE void add_fours_pairwise(__m256i *sums, __m256i weights, __m256i inputs) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(inputs, weights));
    *sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* out [rows][columns] += a group's sums times the scales of weights and inputs. */
ALWAYS_INLINE void int8_group(int has_vnni, const int8_t *x, const weight_group *group, int column, prefetch how,
                              int64_t num_groups, int64_t g, int rows, float *out) {
    enum { VECTORS_OF_COLUMNS = INT8_COLUMNS / WIDTH };
    int64_t stride = int8_row_bytes(num_groups);
    __m256i sums[INT8_ROWS][VECTORS_OF_COLUMNS];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS_OF_COLUMNS; v++)
            sums[i][v] = _mm256_set1_epi32(has_vnni ? -input_offsets(x + i * stride, num_groups)[g] : 0);
    for (int64_t k = 0; k < INT8_GROUP / 4; k++) {
        const int8_t *numbers = group->numbers[k][column];
        prefetch_weights(numbers, how);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS_OF_COLUMNS; v++) {
            __m256i weights = _mm256_loadu_si256((const __m256i *)(numbers + 32 * v));
            if (has_vnni) weights = _mm256_xor_si256(weights, _mm256_set1_epi8((char)128)); /* + 128 */
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) {
                int32_t four;
                memcpy(&four, x + i * stride + g * INT8_GROUP + 4 * k, sizeof four);
                if (has_vnni)
                    add_fours_vnni(&sums[i][v], weights, _mm256_set1_epi32(four));
                else
                    add_fours_pairwise(&sums[i][v], weights, _mm256_set1_epi32(four));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS_OF_COLUMNS; v++) {
            float *to = out + i * PANEL + column + v * WIDTH;
            vec scale = load_bf16(group->scales + column + v * WIDTH) * input_scales(x + i * stride, num_groups)[g];
            __m256 scaled = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i][v]), (__m256)scale, _mm256_loadu_ps(to));
            _mm256_storeu_ps(to, scaled);
        }
}

ALWAYS_INLINE void int8_panel(int has_vnni, const int8_t *x, const weight_group *panel, prefetch how,
                              int64_t num_groups, int rows, float *out) {
    for (int i = 0; i < rows * PANEL; i += WIDTH) store(out + i, (vec){0});
    for (int64_t g = 0; g < num_groups; g++)
        for (int column = 0; column < PANEL; column += INT8_COLUMNS)
            int8_group(has_vnni, x, panel + g, column, how, num_groups, g, rows, out);
}

static void int8_tile(const int8_t *x, const weight_group *panel, prefetch how, int64_t num_groups, int rows,
                      float *out) {
#define ROWS(n) \
    case n: \
        if (processor.has_avx_vnni) \
            int8_panel(1, x, panel, how, num_groups, n, out); \
        else \
            int8_panel(0, x, panel, how, num_groups, n, out); \
        break;
    switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) }
#undef ROWS
}
