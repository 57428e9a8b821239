/* All layers of a decoder in one parallel region: between small operations, threads meet at barriers instead of being
 * sent for. The residual stream stays float32. */

#include "barrier.h"
#include "kernels.h"

#include <omp.h>

#ifdef CAN_MULTIPLY

/* A layer, as cllm_core.backends.cpu.decoder writes it. */
typedef struct {
    linear qkv, out, gate_up, down;
    const bf16 *input_norm, *mlp_norm; /* [hidden size] */
    const bf16 *query_norm, *key_norm; /* [size], or null */
    int64_t num_heads, num_kv_heads, size, window;
    float input_epsilon, mlp_epsilon, query_epsilon, key_epsilon, scale;
} decoder_layer;

/* A step, likewise. */
typedef struct {
    const row_span *rows;
    const int64_t *block_ids;
    const int64_t *slots;         /* [T] */
    bf16 *const *keys;            /* of each layer: its cache */
    bf16 *const *values;
    const bf16 *cos, *sin;        /* [T, size] */
    int64_t num_rows, num_tokens, block_size;
} decoder_step;

/* Of a team: out[i] = x[i] / rms(x[i]) * weight. */
static void normalise(const float *x, const bf16 *weight, float epsilon, int64_t num_rows, int64_t size, bf16 *out) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < num_rows; row++) {
        const float *in = x + row * size;
        vec squares = {0};
        for (int64_t i = 0; i < size; i += LANES) squares += *(const vec *)(in + i) * *(const vec *)(in + i);
        float factor = 1.0f / __builtin_sqrtf(sum(squares) / (float)size + epsilon);
        for (int64_t i = 0; i < size; i += LANES)
            store(out + row * size + i, *(const vec *)(in + i) * factor * load(weight + i));
    }
}

/* Of a team: norms and turns queries and keys, and stores keys and values. heads: [T, num_heads + 2 num_kv_heads, size]. */
static void turn_and_store(const decoder_layer *layer, const decoder_step *step, int64_t index, const attention *a,
                           bf16 *heads) {
    int64_t size = layer->size, num_heads = layer->num_heads, num_kv_heads = layer->num_kv_heads;
    int64_t stride = (num_heads + 2 * num_kv_heads) * size;
#pragma omp for schedule(static) nowait
    for (int64_t token = 0; token < step->num_tokens; token++) {
        bf16 *query = heads + token * stride, *key = query + num_heads * size, *value = key + num_kv_heads * size;
        if (layer->query_norm) {
            cllm_rms_norm(query, size, layer->query_norm, layer->query_epsilon, num_heads, size, query);
            cllm_rms_norm(key, size, layer->key_norm, layer->key_epsilon, num_kv_heads, size, key);
        }
        cllm_rotate(query, stride, step->cos + token * size, step->sin + token * size, 1, num_heads + num_kv_heads,
                    size);
        store_token(a, key, value, step->slots[token], step->keys[index], step->values[index]);
    }
}

static void run_layer(const decoder_layer *layer, const decoder_step *step, int64_t index, float *residual,
                      bf16 *const *buffers, input_group *room, barrier *team) {
    int64_t num_tokens = step->num_tokens, hidden_size = layer->qkv.num_in;
    bf16 *normed = buffers[0], *heads = buffers[1], *attended = buffers[2], *gated = buffers[3];
    const void *inputs; /* of the next product */
    attention a = {heads,         step->keys[index], step->values[index], step->rows,
                   step->block_ids, attended,        layer->qkv.num_out,  step->num_rows,
                   step->block_size, layer->num_heads, layer->num_kv_heads, layer->size,
                   layer->window, layer->scale};
    normalise(residual, layer->input_norm, layer->input_epsilon, num_tokens, hidden_size, normed);
    inputs = to_inputs(&layer->qkv, normed, num_tokens, room); /* each thread the tokens that it normalised */
    meet(team);
    multiply(&layer->qkv, inputs, num_tokens, heads);
    meet(team);
    turn_and_store(layer, step, index, &a, heads);
    meet(team);
    attend_rows(&a);
    meet(team);
    inputs = to_inputs(&layer->out, attended, num_tokens, room);
    if (inputs == room) meet(team);
    multiply_add(&layer->out, inputs, num_tokens, residual);
    meet(team);
    normalise(residual, layer->mlp_norm, layer->mlp_epsilon, num_tokens, hidden_size, normed);
    inputs = to_inputs(&layer->gate_up, normed, num_tokens, room);
    meet(team);
    multiply_gated(&layer->gate_up, inputs, num_tokens, gated);
    meet(team);
    inputs = to_inputs(&layer->down, gated, num_tokens, room);
    if (inputs == room) meet(team);
    multiply_add(&layer->down, inputs, num_tokens, residual);
    meet(team);
}

/* residual [T, hidden size]: the tokens' embeddings, changed in place into what the layers make of them.
 * buffers: of normed [T, hidden size], heads [T, qkv], attended [T, num_heads * size], gated [T, intermediate size].
 * room: for the inputs of int8 weights, [T, most inputs of a product / INT8_GROUP]. */
void cllm_decode(const decoder_layer *layers, int64_t num_layers, const decoder_step *step, int num_threads,
                 float *residual, bf16 *const *buffers, input_group *room) {
    barrier team = {0};
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp single
        team.num_threads = omp_get_num_threads(); /* may be fewer than asked for */
        for (int64_t index = 0; index < num_layers; index++)
            run_layer(&layers[index], step, index, residual, buffers, room, &team);
    }
}
#endif
