/* Tiles by AVX-512 without dot products of bfloat16 numbers; those of 8-bit numbers where the processor has them. */

#include "kernels.h"

#define BF16_ROWS 12
#define WHOLE_PANEL_ROWS 12

#include "tiles_avx512_int8.h"
#include "tiles_fma.h"

static inline void begin_tiles(int64_t num_tokens) { (void)num_tokens; }
static inline void end_tiles(void) {}

static void int8_tile(const int8_t *x, const weight_group *panel, prefetch how, int64_t num_groups, int rows,
                      float *out) {
    if (processor.has_avx512_vnni)
        int8_tile_vnni(x, panel, how, num_groups, rows, out);
    else
        int8_tile_pairwise(x, panel, how, num_groups, rows, out);
}
