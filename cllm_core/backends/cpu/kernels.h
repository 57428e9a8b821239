/* Types and helpers of the C kernels. Numbers are read as bfloat16 and computed as float32.
 *
 * Plain C with the vector types of GCC and Clang, so that one source serves AVX2, AVX-512 and NEON; matrix products
 * alone take AVX512-BF16 and AVX512-VNNI. Called through ctypes (cllm_core/backends/cpu/kernels.py), which checks shapes. Functions
 * without the prefix cllm_ that say "of a team" are called by all threads of a parallel region and share the work out;
 * their results are complete after the next barrier.
 */

#ifndef CLLM_KERNELS_H
#define CLLM_KERNELS_H

#include <stdint.h>
#include <string.h>

#define LANES 16 /* of a vector */

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

static inline float largest(vec x) {
    float all[LANES];
    memcpy(all, &x, sizeof all);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) all[i] = all[i] > all[i + half] ? all[i] : all[i + half];
    return all[0];
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

/* One row of a step, as cllm_core.backends.cpu.step writes it. */
typedef struct {
    int64_t first_index; /* of the step's tokens */
    int64_t num_tokens;
    int64_t first_position;
    int64_t first_block; /* where the row's blocks begin in block_ids */
} row_span;

/* Attention of one layer. Tokens are query_stride numbers apart in query, num_heads * size in out; how keys and values
 * lie in the cache: attention.c. window: a token sees itself and the window - 1 tokens before it; 0: all. */
typedef struct {
    const bf16 *query;
    const bf16 *keys;
    const bf16 *values;
    const row_span *rows;
    const int64_t *block_ids;
    bf16 *out;
    int64_t query_stride, num_rows, block_size, num_heads, num_kv_heads, size, window;
    float scale;
} attention;

/* A linear layer: out [T, num_out] of x [T, num_in]. Its weight [num_out, num_in] lies in panels of PANEL outputs:
 * bf16 [num_out / PANEL][num_in / 2][PANEL][2], or weight_group [num_out / PANEL][num_in / INT8_GROUP]. */
#define PANEL 32
typedef struct {
    const void *panels;
    const float *bias; /* [num_out], or null */
    int64_t num_in, num_out, is_int8;
} linear;

/* INT8_GROUP inputs of a panel in 8 bits: a weight is (number - 128) * scale of its output. */
#define INT8_GROUP 64
typedef struct {
    uint8_t numbers[INT8_GROUP / 4][PANEL][4];
    bf16 scales[PANEL];
} weight_group;

/* INT8_GROUP inputs of a token in 8 bits: an input is number * scale. offset: the sum of the numbers times 128, which is what
 * the weights' 128 add to every product. */
typedef struct {
    int8_t numbers[INT8_GROUP];
    float scale;
    int32_t offset;
} input_group;

void cllm_rms_norm(const bf16 *x, int64_t stride, const bf16 *weight, float epsilon, int64_t num_rows, int64_t size,
                   bf16 *out);
void cllm_rotate(bf16 *heads, int64_t stride, const bf16 *cos, const bf16 *sin, int64_t num_tokens, int64_t num_heads,
                 int64_t size);
void store_token(const attention *a, const bf16 *key, const bf16 *value, int64_t slot, bf16 *keys, bf16 *values);
void attend_rows(const attention *a);

/* Processors with the former have the latter too. */
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define CAN_MULTIPLY
const void *to_inputs(const linear *layer, const bf16 *x, int64_t num_tokens, input_group *room);
void multiply(const linear *layer, const void *inputs, int64_t num_tokens, bf16 *out);
void multiply_add(const linear *layer, const void *inputs, int64_t num_tokens, float *out);
void multiply_gated(const linear *layer, const void *inputs, int64_t num_tokens, bf16 *out);
#endif

#endif
