/* Matrix products, by the instructions of AVX512-BF16: linear layers and the output layer. Every sum runs in the same
 * order whatever else is computed with it, so that a token's numbers are the same in any batch. */

#include "kernels.h"

/* Whether this library has matrix products. */
int cllm_can_multiply(void) {
#ifdef __AVX512BF16__
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

#ifdef __AVX512BF16__
#include <immintrin.h>

#define PANEL_ROWS 12   /* tokens whose products with a panel are summed in registers */
#define PANEL_BLOCK 240 /* tokens whose inputs stay in the second cache */
#define FETCH_AHEAD 4096 /* numbers of a weight asked of memory before they are needed: 8 KiB */

/* What becomes of a product. */
typedef enum { STORE, STORE_FLOAT, ADD, GATE } use;

/* sums [rows][PANEL] of x [rows, num_in] and one panel. What lies at `ahead`, as long as a panel, is asked of memory. */
static inline __attribute__((always_inline)) void panel_tile(const bf16 *x, const bf16 *panel, const bf16 *ahead,
                                                             int64_t num_in, int rows, float *out) {
    __m512 sums[PANEL_ROWS][2];
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < num_in; k += 2) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(panel + k * PANEL);
        __m512bh last = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + PANEL);
        if (ahead) {
            _mm_prefetch((const char *)(ahead + k * PANEL), _MM_HINT_T1);
            _mm_prefetch((const char *)(ahead + k * PANEL + PANEL), _MM_HINT_T1);
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

/* panel_tile for a number of rows that the compiler does not know. */
static void panel_sums(const bf16 *x, const bf16 *panel, const bf16 *ahead, int64_t num_in, int64_t rows, float *out) {
    switch (rows) {
#define ROWS(n) \
    case n: \
        panel_tile(x, panel, ahead, num_in, n, out); \
        break;
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#undef ROWS
    }
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

static inline __attribute__((always_inline)) void multiply_and(use what, const linear *layer, const bf16 *x,
                                                               int64_t num_tokens, void *out) {
    for (int64_t block = 0; block < num_tokens; block += PANEL_BLOCK) {
        int64_t end = num_tokens - block < PANEL_BLOCK ? num_tokens : block + PANEL_BLOCK;
        int64_t passes = (end - block + PANEL_ROWS - 1) / PANEL_ROWS;
#pragma omp for schedule(static) nowait
        for (int64_t column = 0; column < layer->num_out; column += PANEL) {
            float sums[PANEL_ROWS * PANEL];
            const bf16 *panel = layer->panels + column * layer->num_in;
            int64_t row = block;
            for (int64_t pass = passes; pass > 0; pass--) {
                int64_t rows = (end - row + pass - 1) / pass; /* passes of about the same size */
                const bf16 *ahead = pass == passes ? panel + FETCH_AHEAD : 0; /* later passes find the panel near */
                panel_sums(x + row * layer->num_in, panel, ahead, layer->num_in, rows, sums);
                for (int64_t i = 0; i < rows; i++) use_sums(layer, what, sums + i * PANEL, row + i, column, out);
                row += rows;
            }
        }
    }
}

/* Of a team: out [T, num_out] = the product. */
void multiply(const linear *layer, const bf16 *x, int64_t num_tokens, bf16 *out) {
    multiply_and(STORE, layer, x, num_tokens, out);
}

/* Of a team: out [T, num_out] += the product. */
void multiply_add(const linear *layer, const bf16 *x, int64_t num_tokens, float *out) {
    multiply_and(ADD, layer, x, num_tokens, out);
}

/* Of a team: out [T, num_out / 2] = silu(gates) * the others, which lie in turns of LANES outputs. */
void multiply_gated(const linear *layer, const bf16 *x, int64_t num_tokens, bf16 *out) {
    multiply_and(GATE, layer, x, num_tokens, out);
}

/* out [T, num_out] of x [T, num_in] and panels; num_in is even, num_out a multiple of PANEL. */
void cllm_linear(const bf16 *x, const bf16 *panels, const float *bias, int64_t num_tokens, int64_t num_in,
                 int64_t num_out, int num_threads, bf16 *out) {
    linear layer = {panels, bias, num_in, num_out};
#pragma omp parallel num_threads(num_threads)
    multiply(&layer, x, num_tokens, out);
}

/* The same with float32 results. */
void cllm_logits(const bf16 *x, const bf16 *panels, int64_t num_tokens, int64_t num_in, int64_t num_out,
                 int num_threads, float *out) {
    linear layer = {panels, 0, num_in, num_out};
#pragma omp parallel num_threads(num_threads)
    multiply_and(STORE_FLOAT, &layer, x, num_tokens, out);
}
#endif
