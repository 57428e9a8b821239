/* All layers of a decoder in one call: between small operations, threads wait at barriers instead of being woken. The
 * residual stream stays float32. */

#include "kernels.h"

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

/* Buffers of a step: the residual stream and what a layer writes for itself. */
typedef struct {
    float *residual; /* [T, hidden size] */
    bf16 *normed;    /* [T, hidden size] */
    bf16 *heads;     /* [T, num_heads + 2 num_kv_heads, size] */
    bf16 *attended;  /* [T, num_heads * size] */
    bf16 *gated;     /* [T, intermediate size] */
    void *inputs;    /* [T, scratch_bytes of the widest product] */
} decoder_buffers;

typedef struct {
    const decoder_layer *layers;
    int64_t num_layers;
    const decoder_step *step;
    decoder_buffers buffers;
} decoder_call;

/* By each member, for its own part of the tokens: out[i] = x[i] / rms(x[i]) * weight. */
static void normalise(member *me, const float *x, const bf16 *weight, float epsilon, int64_t num_tokens, int64_t size,
                      bf16 *out) {
    range tokens = own_range(me, num_tokens);
    for (int64_t token = tokens.first; token < tokens.end; token++) {
        const float *in = x + token * size;
        vec squares = {0};
        for (int64_t i = 0; i < size; i += WIDTH) squares += load(in + i) * load(in + i);
        float factor = 1.0f / __builtin_sqrtf(reduce_add(squares) / (float)size + epsilon);
        for (int64_t i = 0; i < size; i += WIDTH)
            store_bf16(out + token * size + i, load(in + i) * factor * load_bf16(weight + i));
    }
}

/* By each member, for its own part of the tokens: norms queries and keys, applies rotary embedding, stores keys and
 * values. */
static void rope_and_store_kv(member *me, const decoder_layer *layer, const decoder_step *step, int64_t index,
                              const attention *a, bf16 *heads) {
    int64_t size = layer->size, num_heads = layer->num_heads, num_kv_heads = layer->num_kv_heads;
    int64_t stride = (num_heads + 2 * num_kv_heads) * size;
    range tokens = own_range(me, step->num_tokens);
    for (int64_t token = tokens.first; token < tokens.end; token++) {
        bf16 *query = heads + token * stride, *key = query + num_heads * size, *value = key + num_kv_heads * size;
        if (layer->query_norm) {
            rms_norm(query, size, layer->query_norm, layer->query_epsilon, num_heads, size, query);
            rms_norm(key, size, layer->key_norm, layer->key_epsilon, num_kv_heads, size, key);
        }
        apply_rope(query, stride, step->cos + token * size, step->sin + token * size, 1, num_heads + num_kv_heads, size);
        store_kv(a, key, value, step->slots[token], step->keys[index], step->values[index]);
    }
}

/* The inputs of a product with x, whose rows other members have written. */
static const void *shared_inputs(member *me, const linear *layer, const bf16 *x, int64_t num_tokens, void *scratch) {
    const void *inputs = to_inputs(me, layer, x, num_tokens, scratch);
    if (inputs == scratch) team_barrier(me);
    return inputs;
}

static void run_layer(member *me, const decoder_layer *layer, const decoder_step *step, int64_t index,
                      const decoder_buffers *b) {
    int64_t num_tokens = step->num_tokens, hidden_size = layer->qkv.num_in;
    const void *inputs; /* of the next product */
    attention a = {
        .query = b->heads, .keys = step->keys[index], .values = step->values[index], .out = b->attended,
        .rows = step->rows, .num_rows = step->num_rows, .block_ids = step->block_ids, .block_size = step->block_size,
        .query_stride = layer->qkv.num_out, .num_heads = layer->num_heads, .num_kv_heads = layer->num_kv_heads,
        .size = layer->size, .window = layer->window, .scale = layer->scale};
    normalise(me, b->residual, layer->input_norm, layer->input_epsilon, num_tokens, hidden_size, b->normed);
    inputs = to_inputs(me, &layer->qkv, b->normed, num_tokens, b->inputs);
    team_barrier(me);
    multiply(me, &layer->qkv, inputs, num_tokens, b->heads);
    team_barrier(me);
    rope_and_store_kv(me, layer, step, index, &a, b->heads);
    team_barrier(me);
    attend_rows(me, &a);
    begin_tiles(num_tokens);
    team_barrier(me);
    inputs = shared_inputs(me, &layer->out, b->attended, num_tokens, b->inputs);
    multiply_add(me, &layer->out, inputs, num_tokens, b->residual);
    team_barrier(me);
    normalise(me, b->residual, layer->mlp_norm, layer->mlp_epsilon, num_tokens, hidden_size, b->normed);
    inputs = to_inputs(me, &layer->gate_up, b->normed, num_tokens, b->inputs);
    team_barrier(me);
    multiply_gated(me, &layer->gate_up, inputs, num_tokens, b->gated);
    team_barrier(me);
    inputs = shared_inputs(me, &layer->down, b->gated, num_tokens, b->inputs);
    multiply_add(me, &layer->down, inputs, num_tokens, b->residual);
    team_barrier(me);
}

static void run_layers(member *me, void *argument) {
    const decoder_call *call = argument;
    begin_tiles(call->step->num_tokens);
    for (int64_t index = 0; index < call->num_layers; index++)
        run_layer(me, &call->layers[index], call->step, index, &call->buffers);
    end_tiles();
}

/* residual: the tokens' embeddings, changed in place into what the layers make of them. */
void EXPORT(decode)(const decoder_layer *layers, int64_t num_layers, const decoder_step *step, int num_threads,
                    const decoder_buffers *buffers) {
    decoder_call call = {layers, num_layers, step, *buffers};
    run_team(num_threads, run_layers, &call);
}
