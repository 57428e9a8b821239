/* Vectors of the processor's own width, in plain C with the vector types of GCC and Clang: one source for AVX-512, AVX2
 * and NEON. Numbers are stored as bfloat16 or float32 and computed as float32.
 */

#ifndef CLLM_VECTOR_H
#define CLLM_VECTOR_H

#include <stdint.h>
#include <string.h>

/* float32 numbers in a vector. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ivec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t bf16;
typedef uint16_t bvec __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

static inline float bf16_to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline bf16 float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

static inline vec load(const float *x) { return *(const vec *)x; }

static inline void store(float *x, vec value) { *(vec *)x = value; }

static inline vec load_bf16(const bf16 *x) {
    uvec bits = __builtin_convertvector(*(const bvec *)x, uvec) << 16;
    return (vec)bits;
}

static inline void store_bf16(bf16 *x, vec value) {
#ifdef __AVX512BF16__
    bvec rounded;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(value)); /* takes numbers below 2^-126 for 0 */
    *(bvec *)x = rounded;
#else
    uvec bits = (uvec)value;
    *(bvec *)x = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, bvec);
#endif
}

static inline vec broadcast(float x) { return x - (vec){0}; }

/* Where mask (the result of a comparison) is set: x, elsewhere y. */
static inline vec blend(ivec mask, vec x, vec y) { return (vec)(((ivec)x & mask) | ((ivec)y & ~mask)); }

static inline vec maximum(vec x, vec y) { return blend(x > y, x, y); }

static inline vec absolute(vec x) { return (vec)((uvec)x & 0x7fffffff); }

static inline float reduce_add(vec x) {
    vec4 parts[WIDTH / 4];
    memcpy(parts, &x, sizeof parts);
#pragma GCC unroll 4
    for (int half = WIDTH / 8; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0][0] + parts[0][2] + (parts[0][1] + parts[0][3]);
}

static inline float reduce_max(vec x) {
    vec4 parts[WIDTH / 4];
    memcpy(parts, &x, sizeof parts);
#pragma GCC unroll 4
    for (int half = WIDTH / 8; half; half /= 2)
        for (int i = 0; i < half; i++) {
            ivec4 larger = parts[i] > parts[i + half];
            parts[i] = (vec4)(((ivec4)parts[i] & larger) | ((ivec4)parts[i + half] & ~larger));
        }
    float first = parts[0][0] > parts[0][1] ? parts[0][0] : parts[0][1];
    float last = parts[0][2] > parts[0][3] ? parts[0][2] : parts[0][3];
    return first > last ? first : last;
}

/* e^x for x <= 0: 2^n * p(r), relative error below 2e-7; 0 below -87. */
static inline vec exp_nonpositive(vec x) {
    ivec tiny = x < -87.0f;
    vec scaled = x * 1.44269504f;
    ivec n = __builtin_convertvector(scaled - 0.5f, ivec); /* towards 0: rounds to nearest, as x <= 0 */
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

/* tanh x, absolute error below 2e-7. */
static inline vec hyperbolic_tangent(vec x) {
    ivec positive = x > 0.0f;
    vec small = exp_nonpositive(2.0f * blend(positive, -x, x));
    vec result = (1.0f - small) / (1.0f + small);
    return blend(positive, result, -result);
}

static inline vec silu(vec x) {
    ivec positive = x > 0.0f;
    vec small = exp_nonpositive(blend(positive, -x, x));
    return x * blend(positive, broadcast(1.0f), small) / (1.0f + small);
}

#endif
