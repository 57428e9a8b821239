/* Norm and rotary embedding. */

#include "kernels.h"

/* out[i] = x[i] / rms(x[i]) * weight for num_rows rows of `size` numbers, `stride` apart in x. */
void cllm_rms_norm(const bf16 *x, int64_t stride, const bf16 *weight, float epsilon, int64_t num_rows, int64_t size,
                   bf16 *out) {
    for (int64_t row = 0; row < num_rows; row++) {
        const bf16 *in = x + row * stride;
        vec squares = {0};
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) squares += load(in + i) * load(in + i);
        float total = sum(squares);
        for (; i < size; i++) total += widen(in[i]) * widen(in[i]);
        float factor = 1.0f / __builtin_sqrtf(total / (float)size + epsilon);
        for (i = 0; i + LANES <= size; i += LANES) store(out + row * size + i, load(in + i) * factor * load(weight + i));
        for (; i < size; i++) out[row * size + i] = narrow(widen(in[i]) * factor * widen(weight[i]));
    }
}

/* In place: heads * cos + rotate_half(heads) * sin. heads [num_tokens, num_heads, size], tokens `stride` apart;
 * cos, sin [num_tokens, size]. */
void cllm_rotate(bf16 *heads, int64_t stride, const bf16 *cos, const bf16 *sin, int64_t num_tokens, int64_t num_heads,
                 int64_t size) {
    int64_t half = size / 2;
    for (int64_t token = 0; token < num_tokens; token++) {
        const bf16 *c = cos + token * size, *s = sin + token * size;
        for (int64_t head = 0; head < num_heads; head++) {
            bf16 *low = heads + token * stride + head * size, *high = low + half;
            for (int64_t i = 0; i < half; i += LANES) {
                if (i + LANES <= half) {
                    vec a = load(low + i), b = load(high + i);
                    store(low + i, a * load(c + i) - b * load(s + i));
                    store(high + i, b * load(c + half + i) + a * load(s + half + i));
                    continue;
                }
                for (int64_t j = i; j < half; j++) {
                    float a = widen(low[j]), b = widen(high[j]);
                    low[j] = narrow(a * widen(c[j]) - b * widen(s[j]));
                    high[j] = narrow(b * widen(c[half + j]) + a * widen(s[half + j]));
                }
            }
        }
    }
}
