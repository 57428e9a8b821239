/* Matrix products, by the instructions of AVX512-BF16 or, where weights have 8 bits, AVX512-VNNI: linear layers and the
 * output layer. Every sum runs in the same order whatever else is computed with it, so that a token's numbers are the
 * same in any batch. */

#include "kernels.h"

/* Whether this library has matrix products. */
int cllm_can_multiply(void) {
#ifdef CAN_MULTIPLY
    return 1;
#else
    return 0;
#endif
}

/* Whether this processor has AMX tiles for bfloat16. */
int cllm_has_tiles(void) {
#ifdef __AMX_BF16__
    return 1;
#else
    return 0;
#endif
}

#ifdef CAN_MULTIPLY
#include <immintrin.h>

#define PANEL_ROWS 12   /* tokens whose products with a panel are summed in registers */
#define INT8_ROWS 8     /* the same for weights of 8 bits: with more, GCC 12 moves sums to memory and back */
#define PANEL_BLOCK 240 /* tokens whose inputs stay in the second cache */
#define FETCH_AHEAD 8192 /* bytes of a weight asked of memory before they are needed */

/* What becomes of a product. */
typedef enum { STORE, STORE_FLOAT, ADD, GATE } use;

/* sums [rows][PANEL] of x [rows, num_in] and one panel. fetch: ask memory for what follows in the weight. */
static inline __attribute__((always_inline)) void panel_tile(const bf16 *x, const bf16 *panel, int fetch,
                                                             int64_t num_in, int rows, float *out) {
    __m512 sums[PANEL_ROWS][2];
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < num_in; k += 2) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(panel + k * PANEL);
        __m512bh last = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + PANEL);
        if (fetch) {
            _mm_prefetch((const char *)(panel + k * PANEL) + FETCH_AHEAD, _MM_HINT_NTA);
            _mm_prefetch((const char *)(panel + k * PANEL + PANEL) + FETCH_AHEAD, _MM_HINT_NTA);
        }
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

/* sums += products of four weights and four inputs each. The intrinsic of GCC 12 copies every sum to memory and back. */
static inline __attribute__((always_inline)) void add_fours(__m512i *sums, __m512i weights, __m512i inputs) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(weights), "v"(inputs));
}

/* panel_tile for weights and inputs of 8 bits, x [rows, num_groups]. Sums of a group are whole numbers. */
static inline __attribute__((always_inline)) void int8_tile(const input_group *x, const weight_group *panel, int fetch,
                                                            int64_t num_groups, int rows, float *out) {
    for (int i = 0; i < 2 * rows; i++) _mm512_storeu_ps(out + i * LANES, _mm512_setzero_ps());
    for (int64_t g = 0; g < num_groups; g++, x++, panel++) {
        __m512i sums[INT8_ROWS][2];
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = _mm512_set1_epi32(-x[i * num_groups].offset);
        for (int64_t k = 0; k < INT8_GROUP / 4; k++) {
            __m512i first = _mm512_loadu_si512(panel->numbers[k]), last = _mm512_loadu_si512(panel->numbers[k] + LANES);
            if (fetch) {
                _mm_prefetch((const char *)panel->numbers[k] + FETCH_AHEAD, _MM_HINT_NTA);
                _mm_prefetch((const char *)(panel->numbers[k] + LANES) + FETCH_AHEAD, _MM_HINT_NTA);
            }
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                int32_t four;
                memcpy(&four, x[i * num_groups].numbers + 4 * k, sizeof four);
                __m512i fours = _mm512_set1_epi32(four);
                add_fours(&sums[i][0], first, fours);
                add_fours(&sums[i][1], last, fours);
            }
        }
        if (fetch) _mm_prefetch((const char *)panel->scales + FETCH_AHEAD, _MM_HINT_NTA);
        __m512 first = (__m512)load(panel->scales), last = (__m512)load(panel->scales + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            __m512 scale = _mm512_set1_ps(x[i * num_groups].scale);
            float *place = out + i * PANEL;
            _mm512_storeu_ps(place, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][0]), _mm512_mul_ps(first, scale),
                                                    _mm512_loadu_ps(place)));
            place += LANES;
            _mm512_storeu_ps(place, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][1]), _mm512_mul_ps(last, scale),
                                                    _mm512_loadu_ps(place)));
        }
    }
}

/* One of both for a number of rows that the compiler does not know. */
static void panel_sums(const linear *layer, const void *x, const void *panel, int fetch, int64_t rows, float *out) {
    int64_t num_in = layer->num_in, num_groups = num_in / INT8_GROUP;
#define ROWS(n) \
    case n: \
        panel_tile(x, panel, fetch, num_in, n, out); \
        break;
#define GROUP_ROWS(n) \
    case n: \
        int8_tile(x, panel, fetch, num_groups, n, out); \
        break;
    if (layer->is_int8) {
        switch (rows) {
            GROUP_ROWS(1) GROUP_ROWS(2) GROUP_ROWS(3) GROUP_ROWS(4)
            GROUP_ROWS(5) GROUP_ROWS(6) GROUP_ROWS(7) GROUP_ROWS(8)
        }
    } else {
        switch (rows) {
            ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
        }
    }
#undef ROWS
#undef GROUP_ROWS
}

/* Of a team: x [T, num_in] in groups of 8 bits, [T, num_in / INT8_GROUP]. */
static void quantise(const bf16 *x, int64_t num_tokens, int64_t num_in, input_group *out) {
    int64_t num_groups = num_in / INT8_GROUP;
#pragma omp for schedule(static) nowait
    for (int64_t token = 0; token < num_tokens; token++) {
        for (int64_t g = 0; g < num_groups; g++) {
            const bf16 *in = x + token * num_in + g * INT8_GROUP;
            input_group *group = out + token * num_groups + g;
            vec top = {0};
            for (int i = 0; i < INT8_GROUP; i += LANES) top = larger(top, (vec)((uvec)load(in + i) & 0x7fffffff));
            float peak = _mm512_reduce_max_ps((__m512)top), inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
            __m512i total = _mm512_setzero_si512();
            for (int i = 0; i < INT8_GROUP; i += LANES) {
                __m512i numbers = _mm512_cvtps_epi32((__m512)(load(in + i) * inverse)); /* to nearest, ties to even */
                _mm_storeu_si128((__m128i *)(group->numbers + i), _mm512_cvtsepi32_epi8(numbers));
                total = _mm512_add_epi32(total, numbers);
            }
            group->scale = peak / 127.0f;
            group->offset = 128 * _mm512_reduce_add_epi32(total);
        }
    }
}

/* Of a team: x as the layer's product reads it: as it is, or in groups of 8 bits, written to `room`. */
const void *to_inputs(const linear *layer, const bf16 *x, int64_t num_tokens, input_group *room) {
    if (!layer->is_int8) return x;
    quantise(x, num_tokens, layer->num_in, room);
    return room;
}

static inline vec silu(vec x) {
    ivec positive = x > 0.0f;
    vec small = exponential((vec)(((ivec)-x & positive) | ((ivec)x & ~positive)));
    vec top = (vec)(((ivec)spread(1.0f) & positive) | ((ivec)small & ~positive));
    return x * top / (1.0f + small);
}

/* Uses the sums of a row with the panel that begins at `column`. GATE: a panel is LANES gates, then what they are for. */
static inline void use_sums(const linear *layer, use what, const float *sums, int64_t row, int64_t column, void *out) {
    vec first = *(const vec *)sums, last = *(const vec *)(sums + LANES);
    if (layer->bias) first += *(const vec *)(layer->bias + column), last += *(const vec *)(layer->bias + column + LANES);
    if (what == GATE) {
        store((bf16 *)out + row * (layer->num_out / 2) + column / 2, silu(first) * last);
    } else if (what == STORE_FLOAT) {
        float *place = (float *)out + row * layer->num_out + column;
        *(vec *)place = first;
        *(vec *)(place + LANES) = last;
    } else if (what == ADD) {
        float *place = (float *)out + row * layer->num_out + column;
        *(vec *)place += first;
        *(vec *)(place + LANES) += last;
    } else {
        bf16 *place = (bf16 *)out + row * layer->num_out + column;
        store(place, first);
        store(place + LANES, last);
    }
}

static inline __attribute__((always_inline)) void multiply_and(use what, const linear *layer, const void *inputs,
                                                               int64_t num_tokens, void *out) {
    int64_t input_bytes = layer->is_int8 ? layer->num_in / INT8_GROUP * (int64_t)sizeof(input_group) : 2 * layer->num_in;
    int64_t panel_bytes = layer->is_int8 ? layer->num_in / INT8_GROUP * (int64_t)sizeof(weight_group)
                                         : 2 * PANEL * layer->num_in;
    int64_t most_rows = layer->is_int8 ? INT8_ROWS : PANEL_ROWS;
    for (int64_t block = 0; block < num_tokens; block += PANEL_BLOCK) {
        int64_t end = num_tokens - block < PANEL_BLOCK ? num_tokens : block + PANEL_BLOCK;
        int64_t passes = (end - block + most_rows - 1) / most_rows;
#pragma omp for schedule(static) nowait
        for (int64_t column = 0; column < layer->num_out; column += PANEL) {
            float sums[PANEL_ROWS * PANEL];
            const char *panel = (const char *)layer->panels + column / PANEL * panel_bytes;
            int64_t row = block;
            for (int64_t pass = passes; pass > 0; pass--) {
                int64_t rows = (end - row + pass - 1) / pass; /* passes of about the same size */
                int fetch = pass == passes; /* later passes find the panel near */
                panel_sums(layer, (const char *)inputs + row * input_bytes, panel, fetch, rows, sums);
                for (int64_t i = 0; i < rows; i++) use_sums(layer, what, sums + i * PANEL, row + i, column, out);
                row += rows;
            }
        }
    }
}

/* Of a team: out [T, num_out] = the product; inputs: of to_inputs. */
void multiply(const linear *layer, const void *inputs, int64_t num_tokens, bf16 *out) {
    multiply_and(STORE, layer, inputs, num_tokens, out);
}

/* Of a team: out [T, num_out] += the product. */
void multiply_add(const linear *layer, const void *inputs, int64_t num_tokens, float *out) {
    multiply_and(ADD, layer, inputs, num_tokens, out);
}

/* Of a team: out [T, num_out / 2] = silu(gates) * the others, which lie in turns of LANES outputs. */
void multiply_gated(const linear *layer, const void *inputs, int64_t num_tokens, bf16 *out) {
    multiply_and(GATE, layer, inputs, num_tokens, out);
}

/* out [T, num_out] of x [T, num_in]; num_in is even, or of int8 weights a multiple of INT8_GROUP, num_out of PANEL.
 * room: for the inputs of int8 weights, [T, num_in / INT8_GROUP]. */
void cllm_linear(const linear *layer, const bf16 *x, int64_t num_tokens, int num_threads, input_group *room,
                 bf16 *out) {
#pragma omp parallel num_threads(num_threads)
    {
        const void *inputs = to_inputs(layer, x, num_tokens, room);
#pragma omp barrier
        multiply(layer, inputs, num_tokens, out);
    }
}

/* The same with float32 results. */
void cllm_logits(const linear *layer, const bf16 *x, int64_t num_tokens, int num_threads, input_group *room,
                 float *out) {
#pragma omp parallel num_threads(num_threads)
    {
        const void *inputs = to_inputs(layer, x, num_tokens, room);
#pragma omp barrier
        multiply_and(STORE_FLOAT, layer, inputs, num_tokens, out);
    }
}
#endif
