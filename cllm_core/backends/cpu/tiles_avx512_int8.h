/* Tiles of 8-bit weights and inputs by AVX-512: with the dot products of AVX512-VNNI, and without. Both are exact. */

#include "kernels.h"

#include <immintrin.h>

#define INT8_ROWS 8 /* with more, GCC 12 moves sums to memory and back */

/* sums += products of four weights and four inputs each. The intrinsic of GCC 12 copies every sum to memory and back. */
ALWAYS_INLINE void add_fours_vnni(__m512i *sums, __m512i weights, __m512i inputs) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(weights), "v"(inputs));
}

/* The same by absolute values of weights, times inputs of their signs: in pairs these fit into 16 bits. */
ALWAYS_INLINE void add_fours_pairwise(__m512i *sums, __m512i absolute_weights, __mmask64 negative, __m512i inputs) {
    __m512i signed_inputs = _mm512_mask_sub_epi8(inputs, negative, _mm512_setzero_si512(), inputs);
    __m512i pairs = _mm512_maddubs_epi16(absolute_weights, signed_inputs);
    *sums = _mm512_add_epi32(*sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

/* out += sums of a group times the scales of weights and inputs. */
ALWAYS_INLINE void scale_group(const __m512i *sums, const bf16 *scales, float input_scale, float *out) {
    for (int v = 0; v < 2; v++) {
        vec scale = load_bf16(scales + v * LANES) * input_scale;
        __m512 group = _mm512_cvtepi32_ps(sums[v]);
        _mm512_storeu_ps(out + v * LANES, _mm512_fmadd_ps(group, (__m512)scale, _mm512_loadu_ps(out + v * LANES)));
    }
}

ALWAYS_INLINE void int8_panel(int has_vnni, const int8_t *x, const weight_group *panel, prefetch how,
                              int64_t num_groups, int rows, float *out) {
    int64_t stride = int8_row_bytes(num_groups);
    for (int i = 0; i < rows * PANEL; i += WIDTH) store(out + i, (vec){0});
    for (int64_t g = 0; g < num_groups; g++, panel++) {
        __m512i sums[INT8_ROWS][2];
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
            sums[i][0] = sums[i][1] = _mm512_set1_epi32(has_vnni ? -input_offsets(x + i * stride, num_groups)[g] : 0);
        for (int64_t k = 0; k < INT8_GROUP / 4; k++) {
            __m512i weights[2] = {_mm512_loadu_si512(panel->numbers[k]), _mm512_loadu_si512(panel->numbers[k] + LANES)};
            __mmask64 negative[2] = {0};
            prefetch_weights(panel->numbers[k], how);
            prefetch_weights(panel->numbers[k] + LANES, how);
            for (int v = 0; v < 2; v++) {
                if (!has_vnni) negative[v] = _mm512_movepi8_mask(weights[v]);
                weights[v] = has_vnni ? _mm512_xor_si512(weights[v], _mm512_set1_epi8((char)128)) /* + 128 */
                                      : _mm512_abs_epi8(weights[v]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                int32_t four;
                memcpy(&four, x + i * stride + g * INT8_GROUP + 4 * k, sizeof four);
                __m512i fours = _mm512_set1_epi32(four);
                for (int v = 0; v < 2; v++)
                    if (has_vnni)
                        add_fours_vnni(&sums[i][v], weights[v], fours);
                    else
                        add_fours_pairwise(&sums[i][v], weights[v], negative[v], fours);
            }
        }
        prefetch_weights(panel->scales, how);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
            scale_group(sums[i], panel->scales, input_scales(x + i * stride, num_groups)[g], out + i * PANEL);
    }
}

#define ROWS(n) \
    case n: \
        int8_panel(HAS_VNNI, x, panel, how, num_groups, n, out); \
        break;
#define ALL_ROWS ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8)

#define HAS_VNNI 1
static void int8_tile_vnni(const int8_t *x, const weight_group *panel, prefetch how, int64_t num_groups, int rows,
                           float *out) {
    switch (rows) { ALL_ROWS }
}
#undef HAS_VNNI

#ifndef __AVX512VNNI__
#define HAS_VNNI 0
static void int8_tile_pairwise(const int8_t *x, const weight_group *panel, prefetch how, int64_t num_groups,
                               int rows, float *out) {
    switch (rows) { ALL_ROWS }
}
#undef HAS_VNNI
#endif

#undef ROWS
#undef ALL_ROWS
