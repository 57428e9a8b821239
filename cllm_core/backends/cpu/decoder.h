/* All layers of a decoder in one call: between small operations, threads spin instead of being woken. The residual stream
 * stays float32. */

#include <stddef.h>

#include "kernels.h"

/* A layer, as cllm_core.backends.cpu.decoder writes it. */
typedef struct {
    linear qkv, out, gate_up, down;
    const bf16 *input_norm, *mlp_norm; /* [hidden size] */
    const bf16 *query_norm, *key_norm; /* [size], or null */
    int64_t num_heads, num_kv_heads, size, window;
    float input_epsilon, mlp_epsilon, query_epsilon, key_epsilon, scale;
} decoder_layer;

/* What an adapter adds to a product: up (down x), both linear layers without a bias; no panels where it adds nothing. */
typedef struct {
    linear down, up;
} low_rank;

/* Of an adapter, for one decoder_layer. */
typedef struct {
    low_rank qkv, out, gate_up, down;
} adapter_layer;

/* The tokens of one adapter in a step. */
typedef struct {
    const adapter_layer *layers;
    const int64_t *tokens; /* [num_tokens] in the step */
    int64_t num_tokens;
} adapted_tokens;

/* A step, likewise. */
typedef struct {
    const row_span *rows;
    const int64_t *block_ids;
    const int64_t *slots;         /* [T] */
    bf16 *const *keys;            /* of each layer: its cache */
    bf16 *const *values;
    const bf16 *cos, *sin;        /* [T, size] */
    int64_t num_rows, num_tokens, block_size;
    const adapted_tokens *adapted; /* [num_adapters], no token in two of them */
    const int64_t *adapted_places; /* [T] of a token among those of all adapters, or -1; null where there are none */
    int64_t num_adapters;
} decoder_step;

/* Buffers of a step: the residual stream and what a layer writes for itself. */
typedef struct {
    float *residual; /* [T, hidden size] */
    bf16 *normed;    /* [T, hidden size] */
    bf16 *heads;     /* [T, num_heads + 2 num_kv_heads, size] */
    bf16 *attended;  /* [T, num_heads * size] */
    bf16 *gated;     /* [T, intermediate size] */
    void *inputs;    /* [T, scratch_bytes of the widest product] */
    /* Of the adapters' tokens: */
    bf16 *own;       /* [widest group, widest input] */
    bf16 *low;       /* [widest group, highest rank] */
    void *own_inputs; /* scratch_bytes of the wider of both */
    float *added;    /* [all of them, widest product] */
} decoder_buffers;

/* A norm of the residual stream, and the inputs of the product that reads it. */
typedef struct {
    const bf16 *weight;
    float epsilon;
    const linear *layer; /* of the product */
    int64_t num_tokens;
    decoder_buffers buffers;
} input_norm;

/* out[i] = x[i] / rms(x[i]) * weight. */
static void normalise_token(const float *x, const bf16 *weight, float epsilon, int64_t size, bf16 *out) {
    vec squares = {0};
    for (int64_t i = 0; i < size; i += WIDTH) squares += load(x + i) * load(x + i);
    float factor = 1.0f / __builtin_sqrtf(reduce_add(squares) / (float)size + epsilon);
    for (int64_t i = 0; i < size; i += WIDTH) store_bf16(out + i, load(x + i) * factor * load_bf16(weight + i));
}

static void normalise_items(member *me, void *argument) {
    const input_norm n = *(const input_norm *)argument;
    int64_t size = n.layer->num_in;
    for (int64_t item; (item = next_item(me)) >= 0;) {
        token_range tokens = item_tokens(item, n.num_tokens, size);
        for (int64_t t = tokens.first; t < tokens.end; t++) {
            normalise_token(n.buffers.residual + t * size, n.weight, n.epsilon, size, n.buffers.normed + t * size);
            convert_token(n.layer, n.buffers.normed, t, n.num_tokens, n.buffers.inputs);
        }
    }
}

/* The inputs of a product with the norm of the residual stream. */
static const void *normalised_inputs(team *t, const bf16 *weight, float epsilon, const linear *layer,
                                     int64_t num_tokens, const decoder_buffers *b) {
    input_norm n = {weight, epsilon, layer, num_tokens, *b};
    run_items(t, num_token_items(num_tokens, layer->num_in), normalise_items, &n);
    return converts_inputs(layer) ? b->inputs : b->normed;
}

typedef struct {
    const decoder_layer *layer;
    const decoder_step *step;
    int64_t index;
    const attention *attention;
    bf16 *heads;
} rope_call;

/* Norms queries and keys of a token, applies rotary embedding, stores keys and values. */
static void rope_and_store_kv(const rope_call *call, int64_t token) {
    const decoder_layer *layer = call->layer;
    const decoder_step *step = call->step;
    int64_t size = layer->size, num_heads = layer->num_heads, num_kv_heads = layer->num_kv_heads;
    int64_t stride = (num_heads + 2 * num_kv_heads) * size;
    bf16 *query = call->heads + token * stride, *key = query + num_heads * size, *value = key + num_kv_heads * size;
    if (layer->query_norm) {
        rms_norm(query, size, layer->query_norm, layer->query_epsilon, num_heads, size, query);
        rms_norm(key, size, layer->key_norm, layer->key_epsilon, num_kv_heads, size, key);
    }
    apply_rope(query, stride, step->cos + token * size, step->sin + token * size, 1, num_heads + num_kv_heads, size);
    store_kv(call->attention, key, value, step->slots[token], step->keys[call->index], step->values[call->index]);
}

static void rope_items(member *me, void *argument) {
    const rope_call *call = argument;
    for (int64_t item; (item = next_item(me)) >= 0;) {
        token_range tokens = item_tokens(item, call->step->num_tokens, call->layer->qkv.num_out);
        for (int64_t token = tokens.first; token < tokens.end; token++) rope_and_store_kv(call, token);
    }
}

/* What the adapters of a step add to a product, which stands at `offset` in an adapter_layer, of inputs x [T, num_in]. */
static addition adapters_share(team *t, const decoder_step *step, int64_t index, int64_t offset, const linear *layer,
                               const bf16 *x, const decoder_buffers *b) {
    float *to = b->added;
    int64_t num_in = layer->num_in, num_out = layer->num_out;
    for (int64_t a = 0; a < step->num_adapters; a++) {
        const adapted_tokens *group = &step->adapted[a];
        const low_rank *w = (const low_rank *)((const char *)&group->layers[index] + offset);
        int64_t n = group->num_tokens;
        if (w->down.panels) {
            for (int64_t i = 0; i < n; i++)
                memcpy(b->own + i * num_in, x + group->tokens[i] * num_in, (size_t)num_in * sizeof(bf16));
            multiply(t, STORE, &w->down, to_inputs(t, &w->down, b->own, n, b->own_inputs), n, b->low);
            multiply(t, STORE_FLOAT, &w->up, to_inputs(t, &w->up, b->low, n, b->own_inputs), n, to);
        } else
            memset(to, 0, (size_t)(n * num_out) * sizeof(float));
        to += n * num_out;
    }
    return (addition){step->adapted_places, b->added};
}

/* A product of a layer, with what adapters add to it. */
#define MULTIPLY(what, part, x, inputs, to)                                                                        \
    multiply_and_add(t, what, &layer->part, inputs, num_tokens,                                                    \
                     adapters_share(t, step, index, offsetof(adapter_layer, part), &layer->part, x, b), to)

static void run_layer(team *t, const decoder_layer *layer, const decoder_step *step, int64_t index,
                      const decoder_buffers *b) {
    int64_t num_tokens = step->num_tokens;
    attention a = {
        .query = b->heads, .keys = step->keys[index], .values = step->values[index], .out = b->attended,
        .rows = step->rows, .num_rows = step->num_rows, .block_ids = step->block_ids, .block_size = step->block_size,
        .query_stride = layer->qkv.num_out, .num_heads = layer->num_heads, .num_kv_heads = layer->num_kv_heads,
        .size = layer->size, .window = layer->window, .scale = layer->scale};
    rope_call rope = {layer, step, index, &a, b->heads};
    const void *inputs = normalised_inputs(t, layer->input_norm, layer->input_epsilon, &layer->qkv, num_tokens, b);
    MULTIPLY(STORE, qkv, b->normed, inputs, b->heads);
    run_items(t, num_token_items(num_tokens, layer->qkv.num_out), rope_items, &rope);
    attend_rows(t, &a);
    inputs = to_inputs(t, &layer->out, b->attended, num_tokens, b->inputs);
    MULTIPLY(ADD, out, b->attended, inputs, b->residual);
    inputs = normalised_inputs(t, layer->mlp_norm, layer->mlp_epsilon, &layer->gate_up, num_tokens, b);
    MULTIPLY(GATE, gate_up, b->normed, inputs, b->gated);
    inputs = to_inputs(t, &layer->down, b->gated, num_tokens, b->inputs);
    MULTIPLY(ADD, down, b->gated, inputs, b->residual);
}

/* residual: the tokens' embeddings, changed in place into what the layers make of them. */
void EXPORT(decode)(const decoder_layer *layers, int64_t num_layers, const decoder_step *step, int num_threads,
                    const decoder_buffers *buffers) {
    team *t = begin_team(num_threads);
    for (int64_t index = 0; index < num_layers; index++) run_layer(t, &layers[index], step, index, buffers);
    end_team(t);
}
