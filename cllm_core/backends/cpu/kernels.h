/* What the parts of the kernels share. They are compiled once for each instruction set (kernels.c), called through
 * ctypes (cllm_core/backends/cpu/kernels.py), which checks shapes, and run by a team of threads (team.h): functions
 * that take a team are loops over items, which those that take a member work on.
 */

#ifndef CLLM_KERNELS_H
#define CLLM_KERNELS_H

#include "team.h"
#include "vector.h"

/* The name under which a function of this instruction set is exported: cllm_avx2_attend. */
#define JOIN(isa, name) cllm_##isa##_##name
#define NAME_FOR(isa, name) JOIN(isa, name)
#define EXPORT_NAME(name) NAME_FOR(ISA, name)
#define EXPORT(name) __attribute__((visibility("default"))) EXPORT_NAME(name)

#define LANES 16 /* numbers in the unit of all layouts in memory, whatever the width of a vector */

/* One row of a step, as cllm_core.backends.cpu.step writes it. */
typedef struct {
    int64_t first_index; /* of the step's tokens */
    int64_t num_tokens;
    int64_t first_position;
    int64_t first_block; /* where the row's blocks begin in block_ids */
    int64_t gap;         /* slots between the tokens before the row and its own, which lie first_position + gap on */
} row_span;

/* A linear layer: out [T, num_out] of x [T, num_in]. Its weight [num_out, num_in] lies in panels of PANEL outputs:
 * bf16 [num_out / PANEL][num_in / 2][PANEL][2], where num_in is rounded up to INPUT_UNIT by weights of 0, or
 * weight_group [num_out / PANEL][num_in / INT8_GROUP]. */
#define PANEL 32
#define INPUT_UNIT 32
typedef struct {
    const void *panels;
    const float *bias; /* [num_out], or null */
    int64_t num_in, num_out, is_int8;
} linear;

/* INT8_GROUP inputs of a panel in 8 bits: a weight is number * scale of its output; numbers lie in -127..127. */
#define INT8_GROUP 64
typedef struct {
    int8_t numbers[INT8_GROUP / 4][PANEL][4];
    bf16 scales[PANEL];
} weight_group;

/* A token's inputs in 8 bits: numbers [num_groups][INT8_GROUP], then a scale and an offset of each group. An input is
 * number * scale. The offset is the sum of the numbers times 128, which is what it adds to every product where an
 * instruction takes weights without sign, that is weights + 128. */
static inline int64_t int8_row_bytes(int64_t num_groups) {
    return (num_groups * (INT8_GROUP + (int64_t)sizeof(float) + (int64_t)sizeof(int32_t)) + 63) / 64 * 64;
}

static inline float *input_scales(const int8_t *row, int64_t num_groups) {
    return (float *)(row + num_groups * INT8_GROUP);
}

static inline int32_t *input_offsets(const int8_t *row, int64_t num_groups) {
    return (int32_t *)(input_scales(row, num_groups) + num_groups);
}

/* How weights are prefetched. */
typedef enum { PREFETCH_NOTHING, PREFETCH_PAST_CACHES, PREFETCH_TO_CACHES } prefetch;

/* What the library found out about this processor beyond its instruction set (dispatch.c). */
typedef struct {
    int has_avx512_vnni, has_avx_vnni, has_dotprod; /* dot products of 8-bit numbers */
    prefetch prefetch;
} processor_traits;

extern processor_traits processor;

#define PREFETCH_AHEAD 8192 /* bytes of a weight */

ALWAYS_INLINE void prefetch_weights(const void *line, prefetch how) {
    const char *ahead = (const char *)line + PREFETCH_AHEAD;
    if (how == PREFETCH_TO_CACHES) __builtin_prefetch(ahead, 0, 3);
    if (how == PREFETCH_PAST_CACHES) __builtin_prefetch(ahead, 0, 0);
}


#endif
