/* bfloat16 weights without instructions for them: cast to float32 as they are read, for multiply-adds with inputs that
 * were cast before. Included by instruction sets that have nothing better:
 *     BF16_ROWS         the most tokens whose sums with half a panel, or a whole one, fit into registers
 *     WHOLE_PANEL_ROWS  the most with a whole one
 */

#include "kernels.h"

typedef float bf16_input;

/* sums [rows][columns] of x [num_in][rows] and columns of a panel, of which `panel` is the first. */
ALWAYS_INLINE void fma_columns(const float *x, const bf16 *panel, prefetch how, int64_t num_in, int rows, int columns,
                               float *out) {
    vec sums[BF16_ROWS][PANEL / WIDTH];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int v = 0; v < columns / WIDTH; v++) sums[i][v] = (vec){0};
    for (int64_t k = 0; k < num_in; k += 2, panel += 2 * PANEL, x += 2 * rows) {
        for (int c = 0; c < columns; c += LANES) prefetch_weights(panel + 2 * c, how);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            vec weights[PANEL / WIDTH];
#pragma GCC unroll 8
            for (int v = 0; v < columns / WIDTH; v++) {
                uvec bits = *(const uvec *)(panel + 2 * v * WIDTH);
                if (odd)
                    bits &= 0xffff0000;
                else
                    bits <<= 16;
                weights[v] = (vec)bits;
            }
#pragma GCC unroll 12
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
                for (int v = 0; v < columns / WIDTH; v++) sums[i][v] += weights[v] * x[odd * rows + i];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int v = 0; v < columns / WIDTH; v++) store(out + i * PANEL + v * WIDTH, sums[i][v]);
}

ALWAYS_INLINE void fma_panel(const float *x, const bf16 *panel, prefetch how, int64_t num_in, int rows, float *out) {
    if (rows <= WHOLE_PANEL_ROWS) {
        fma_columns(x, panel, how, num_in, rows, PANEL, out);
        return;
    }
    for (int c = 0; c < PANEL; c += PANEL / 2)
        fma_columns(x, panel + 2 * c, how, num_in, rows, PANEL / 2, out + c);
}

static void bf16_tile(const bf16_input *x, const bf16 *panel, prefetch how, int64_t num_in, int rows, float *out) {
#define ROWS(n) \
    case n: \
        if (n <= BF16_ROWS) fma_panel(x, panel, how, num_in, n <= BF16_ROWS ? n : 1, out); \
        break;
    switch (rows) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
    }
#undef ROWS
}
