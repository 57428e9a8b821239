/* Norms and rotary embedding. */

#include "kernels.h"

/* out[i] = x[i] / rms(x[i]) * weight for num_rows rows of `size` numbers, `stride` apart in x. */
static void rms_norm(const bf16 *x, int64_t stride, const bf16 *weight, float epsilon, int64_t num_rows, int64_t size,
                     bf16 *out) {
    for (int64_t row = 0; row < num_rows; row++) {
        const bf16 *in = x + row * stride;
        vec squares = {0};
        int64_t i = 0;
        for (; i + WIDTH <= size; i += WIDTH) squares += load_bf16(in + i) * load_bf16(in + i);
        float total = reduce_add(squares);
        for (; i < size; i++) total += bf16_to_float(in[i]) * bf16_to_float(in[i]);
        float factor = 1.0f / __builtin_sqrtf(total / (float)size + epsilon);
        for (i = 0; i + WIDTH <= size; i += WIDTH)
            store_bf16(out + row * size + i, load_bf16(in + i) * factor * load_bf16(weight + i));
        for (; i < size; i++)
            out[row * size + i] = float_to_bf16(bf16_to_float(in[i]) * factor * bf16_to_float(weight[i]));
    }
}

/* In place: heads * cos + rotate_half(heads) * sin. heads [num_tokens, num_heads, size], tokens `stride` apart;
 * cos, sin [num_tokens, size]. */
static void apply_rope(bf16 *heads, int64_t stride, const bf16 *cos, const bf16 *sin, int64_t num_tokens,
                       int64_t num_heads, int64_t size) {
    int64_t half = size / 2;
    for (int64_t token = 0; token < num_tokens; token++) {
        const bf16 *c = cos + token * size, *s = sin + token * size;
        for (int64_t head = 0; head < num_heads; head++) {
            bf16 *low = heads + token * stride + head * size, *high = low + half;
            int64_t i = 0;
            for (; i + WIDTH <= half; i += WIDTH) {
                vec a = load_bf16(low + i), b = load_bf16(high + i);
                store_bf16(low + i, a * load_bf16(c + i) - b * load_bf16(s + i));
                store_bf16(high + i, b * load_bf16(c + half + i) + a * load_bf16(s + half + i));
            }
            for (; i < half; i++) {
                float a = bf16_to_float(low[i]), b = bf16_to_float(high[i]);
                low[i] = float_to_bf16(a * bf16_to_float(c[i]) - b * bf16_to_float(s[i]));
                high[i] = float_to_bf16(b * bf16_to_float(c[half + i]) + a * bf16_to_float(s[half + i]));
            }
        }
    }
}

void EXPORT(rms_norm)(const bf16 *x, int64_t stride, const bf16 *weight, float epsilon, int64_t num_rows, int64_t size,
                      bf16 *out) {
    rms_norm(x, stride, weight, epsilon, num_rows, size, out);
}

void EXPORT(apply_rope)(bf16 *heads, int64_t stride, const bf16 *cos, const bf16 *sin, int64_t num_tokens,
                        int64_t num_heads, int64_t size) {
    apply_rope(heads, stride, cos, sin, num_tokens, num_heads, size);
}
