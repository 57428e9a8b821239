/* Tiles by NEON; of 8-bit numbers by the dot products of ARMv8.2 where the processor has them. Both ways of the latter
 * are exact. */

#include "kernels.h"

#include <arm_neon.h>

#define BF16_ROWS 5
#define WHOLE_PANEL_ROWS 2
#define INT8_ROWS 4
#define INT8_COLUMNS 16 /* of a panel at a time */

#include "tiles_fma.h"

static inline void begin_tiles(int64_t num_tokens) { (void)num_tokens; }
static inline void end_tiles(void) {}

/* sums += products of four weights and four inputs each; the intrinsic takes flags that other processors' code must not
 * be compiled with. */
ALWAYS_INLINE void add_fours_dot(int32x4_t *sums, int8x16_t weights, int8x16_t inputs) {
    __asm__(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(*sums) : "w"(weights), "w"(inputs));
}

ALWAYS_INLINE void add_fours_pairwise(int32x4_t *sums, int8x16_t weights, int8x16_t inputs) {
    int16x8_t first = vmull_s8(vget_low_s8(weights), vget_low_s8(inputs)), last = vmull_high_s8(weights, inputs);
    *sums = vaddq_s32(*sums, vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(last)));
}

/* out [rows][columns] += a group's sums times the scales of weights and inputs. */
ALWAYS_INLINE void int8_group(int has_dot, const int8_t *x, const weight_group *group, int column, prefetch how,
                              int64_t num_groups, int64_t g, int rows, float *out) {
    enum { VECTORS_OF_COLUMNS = INT8_COLUMNS / WIDTH };
    int64_t stride = int8_row_bytes(num_groups);
    int32x4_t sums[INT8_ROWS][VECTORS_OF_COLUMNS];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS_OF_COLUMNS; v++) sums[i][v] = vdupq_n_s32(0);
    for (int64_t k = 0; k < INT8_GROUP / 4; k++) {
        const int8_t *numbers = group->numbers[k][column];
        prefetch_weights(numbers, how);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS_OF_COLUMNS; v++) {
            int8x16_t weights = vld1q_s8(numbers + 16 * v);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) {
                int32_t four;
                memcpy(&four, x + i * stride + g * INT8_GROUP + 4 * k, sizeof four);
                int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(four));
                if (has_dot)
                    add_fours_dot(&sums[i][v], weights, inputs);
                else
                    add_fours_pairwise(&sums[i][v], weights, inputs);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS_OF_COLUMNS; v++) {
            float *to = out + i * PANEL + column + v * WIDTH;
            vec scale = load_bf16(group->scales + column + v * WIDTH) * input_scales(x + i * stride, num_groups)[g];
            vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(sums[i][v]), (float32x4_t)scale));
        }
}

ALWAYS_INLINE void int8_panel(int has_dot, const int8_t *x, const weight_group *panel, prefetch how,
                              int64_t num_groups, int rows, float *out) {
    for (int i = 0; i < rows * PANEL; i += WIDTH) store(out + i, (vec){0});
    for (int64_t g = 0; g < num_groups; g++)
        for (int column = 0; column < PANEL; column += INT8_COLUMNS)
            int8_group(has_dot, x, panel + g, column, how, num_groups, g, rows, out);
}

static void int8_tile(const int8_t *x, const weight_group *panel, prefetch how, int64_t num_groups, int rows,
                      float *out) {
#define ROWS(n) \
    case n: \
        if (processor.has_dotprod) \
            int8_panel(1, x, panel, how, num_groups, n, out); \
        else \
            int8_panel(0, x, panel, how, num_groups, n, out); \
        break;
    switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) }
#undef ROWS
}
