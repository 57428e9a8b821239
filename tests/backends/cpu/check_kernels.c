/* Checks the kernels of one instruction set (ISA) against sums in float64, and that no number depends on what else is
 * computed with it. For processors that Python does not run on here: compiled with dispatch.c and team.c, and run under
 * an emulator (test_check_kernels.py). Prints what is wrong; the exit status is 1 then.
 */

#include "kernels.c"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define BLOCK_SIZE 16
#define NUM_BLOCKS 16

void cllm_use_dot_products(int use);
int cllm_supports(const char *isa);

static int num_wrong, num_checks;

static void expect(int holds, const char *what, int64_t a, int64_t b, int64_t c) {
    num_checks++;
    if (holds) return;
    num_wrong++;
    printf("wrong: %s (%d, %d, %d)\n", what, (int)a, (int)b, (int)c);
}

static __attribute__((noinline)) float noise(void) {
    static uint64_t state = 1;
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(state >> 40) / (1 << 24) - 0.5f;
    }
    return sum * 1.7f; /* of variance one, about */
}

static bf16 *noise_bf16(int64_t count, float scale) {
    bf16 *out = malloc(sizeof(bf16) * (size_t)count);
    for (int64_t i = 0; i < count; i++) out[i] = float_to_bf16(scale * noise());
    return out;
}

static void *zeros(int64_t bytes) { return calloc(1, (size_t)bytes); }

/* A weight as the kernels read it, beside what it stands for. */
typedef struct {
    linear layer;
    double *weight; /* [num_out, num_in] */
} test_layer;

static test_layer make_layer(int64_t num_out, int64_t num_in, int has_bias, int is_int8, float scale) {
    test_layer out = {{0, 0, num_in, num_out, is_int8}, malloc(sizeof(double) * (size_t)(num_out * num_in))};
    char *panels = zeros(panel_bytes(&out.layer) * (num_out / PANEL));
    for (int64_t o = 0; o < num_out; o++) {
        char *panel = panels + o / PANEL * panel_bytes(&out.layer);
        for (int64_t i = 0; i < num_in; i++) {
            if (is_int8) {
                weight_group *group = (weight_group *)panel + i / INT8_GROUP;
                if (i % INT8_GROUP == 0) group->scales[o % PANEL] = float_to_bf16(scale / 64 * (1.5f + noise() / 4));
                int number = (int)(127.99f * (noise() / 3.5f));
                group->numbers[i % INT8_GROUP / 4][o % PANEL][i % 4] = (int8_t)number;
                out.weight[o * num_in + i] = number * (double)bf16_to_float(group->scales[o % PANEL]);
            } else {
                bf16 value = float_to_bf16(scale * noise());
                ((bf16 *)panel)[(i / 2 * PANEL + o % PANEL) * 2 + i % 2] = value;
                out.weight[o * num_in + i] = bf16_to_float(value);
            }
        }
    }
    float *bias = malloc(sizeof(float) * (size_t)num_out);
    for (int64_t o = 0; o < num_out; o++) bias[o] = noise();
    out.layer.panels = panels;
    out.layer.bias = has_bias ? bias : 0;
    return out;
}

static float *run_logits(const linear *layer, const bf16 *x, int64_t num_tokens, int num_threads) {
    void *scratch = zeros(EXPORT_NAME(scratch_bytes)(num_tokens, layer->num_in, layer->is_int8) + 1);
    float *out = zeros(num_tokens * layer->num_out * 4);
    EXPORT_NAME(logits)(layer, x, num_tokens, num_threads, scratch, out);
    free(scratch);
    return out;
}

/* The product of one token and one output in 8 bits, each group's sum exact: [0] as it is rounded, [1] its size. */
static float int8_product(const test_layer *t, const bf16 *x, int64_t output) {
    float sum = 0;
    for (int64_t g = 0; g < t->layer.num_in / INT8_GROUP; g++) {
        const weight_group *group =
            (const weight_group *)((const char *)t->layer.panels + output / PANEL * panel_bytes(&t->layer)) + g;
        float largest = 0;
        for (int i = 0; i < INT8_GROUP; i++) {
            float size = fabsf(bf16_to_float(x[g * INT8_GROUP + i]));
            if (size > largest) largest = size;
        }
        volatile float inverse = largest > 0 ? 127.0f / largest : 0;
        int32_t total = 0;
        for (int i = 0; i < INT8_GROUP; i++) {
            volatile float scaled = bf16_to_float(x[g * INT8_GROUP + i]) * inverse;
            total += group->numbers[i / 4][output % PANEL][i % 4] * (int32_t)lrintf(scaled);
        }
        volatile float scale = bf16_to_float(group->scales[output % PANEL]) * (largest / 127.0f);
        sum = fmaf((float)total, scale, sum);
    }
    return sum + (t->layer.bias ? t->layer.bias[output] : 0);
}

static void check_product(int64_t num_tokens, int64_t num_in, int64_t num_out, int is_int8) {
    test_layer t = make_layer(num_out, num_in, num_tokens % 2, is_int8, 1);
    bf16 *x = noise_bf16(num_tokens * num_in, 1);
    float *out = run_logits(&t.layer, x, num_tokens, 3);
    int is_near = 1, is_alike = 1;
    for (int64_t token = 0; token < num_tokens; token++) {
        float *alone = run_logits(&t.layer, x + token * num_in, 1, 1);
        if (memcmp(alone, out + token * num_out, sizeof(float) * (size_t)num_out)) is_alike = 0;
        free(alone);
        for (int64_t o = 0; o < num_out; o++) {
            double exact = t.layer.bias ? t.layer.bias[o] : 0, size = fabs(exact);
            for (int64_t i = 0; i < num_in; i++) {
                double term = t.weight[o * num_in + i] * bf16_to_float(x[token * num_in + i]);
                exact += term;
                size += fabs(term);
            }
            float found = out[token * num_out + o];
            if (fabs(found - exact) > (is_int8 ? 0.02 : 1e-6) * size) is_near = 0;
            if (is_int8 && found != int8_product(&t, x + token * num_in, o)) is_near = 0;
        }
    }
    expect(is_near, is_int8 ? "int8 products are those of whole numbers" : "products are near", num_tokens, num_in, num_out);
    expect(is_alike, "a product is the same alone", num_tokens, num_in, num_out);
    free(x), free(out), free(t.weight);
}

static void check_norm_and_rope(int64_t size) {
    bf16 *x = noise_bf16(size, 1), *weight = noise_bf16(size, 1), *out = zeros(2 * size), *before = zeros(2 * size);
    double squares = 0;
    int is_near = 1;
    EXPORT_NAME(rms_norm)(x, size, weight, 1e-5f, 1, size, out);
    for (int64_t i = 0; i < size; i++) squares += pow(bf16_to_float(x[i]), 2);
    for (int64_t i = 0; i < size; i++) {
        double exact = bf16_to_float(x[i]) / sqrt(squares / (double)size + 1e-5) * bf16_to_float(weight[i]);
        if (!(fabs(bf16_to_float(out[i]) - exact) <= fabs(exact) / 256 + 1e-6)) is_near = 0;
    }
    expect(is_near, "a norm is near", size, 0, 0);
    bf16 *cosine = noise_bf16(size, 1), *sine = noise_bf16(size, 1);
    memcpy(before, x, 2 * (size_t)size);
    EXPORT_NAME(apply_rope)(x, size, cosine, sine, 1, 1, size);
    for (int64_t i = 0; i < size; i++) {
        double other = i < size / 2 ? -bf16_to_float(before[i + size / 2]) : bf16_to_float(before[i - size / 2]);
        double a = (double)bf16_to_float(before[i]) * bf16_to_float(cosine[i]), b = other * bf16_to_float(sine[i]);
        if (!(fabs(bf16_to_float(x[i]) - a - b) <= (fabs(a) + fabs(b)) / 256 + 1e-6)) is_near = 0;
    }
    expect(is_near, "rotary embedding is near", size, 0, 0);
}

/* A model of NUM_LAYERS layers and its cache, for one text whose blocks are in no order. */
#define NUM_LAYERS 2
#define NUM_TOKENS 75
static const int64_t BLOCKS[] = {7, 2, 11, 5, 0};

typedef struct {
    int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, size;
    test_layer qkv[NUM_LAYERS], out[NUM_LAYERS], gate_up[NUM_LAYERS], down[NUM_LAYERS];
    decoder_layer layers[NUM_LAYERS];
    bf16 *cosine, *sine; /* [NUM_TOKENS, size] */
    float *embeddings;   /* [NUM_TOKENS, hidden_size] */
} test_model;

static test_model make_model(int is_int8, int has_head_norms, int64_t window) {
    test_model m = {.hidden_size = 128, .intermediate_size = 192, .num_heads = 6, .num_kv_heads = 2, .size = 32};
    for (int l = 0; l < NUM_LAYERS; l++) {
        m.qkv[l] = make_layer((m.num_heads + 2 * m.num_kv_heads) * m.size, m.hidden_size, 1, is_int8, 0.1f);
        m.out[l] = make_layer(m.hidden_size, m.num_heads * m.size, 0, is_int8, 0.1f);
        m.gate_up[l] = make_layer(2 * m.intermediate_size, m.hidden_size, 0, is_int8, 0.1f);
        m.down[l] = make_layer(m.hidden_size, m.intermediate_size, 0, is_int8, 0.1f);
        m.layers[l] = (decoder_layer){
            .qkv = m.qkv[l].layer, .out = m.out[l].layer, .gate_up = m.gate_up[l].layer, .down = m.down[l].layer,
            .input_norm = noise_bf16(m.hidden_size, 1), .mlp_norm = noise_bf16(m.hidden_size, 1),
            .query_norm = has_head_norms ? noise_bf16(m.size, 1) : 0,
            .key_norm = has_head_norms ? noise_bf16(m.size, 1) : 0,
            .num_heads = m.num_heads, .num_kv_heads = m.num_kv_heads, .size = m.size, .window = window,
            .input_epsilon = 1e-5f, .mlp_epsilon = 1e-5f, .query_epsilon = 1e-6f, .key_epsilon = 1e-6f, .scale = 0.2f};
    }
    m.cosine = noise_bf16(NUM_TOKENS * m.size, 0.7f);
    m.sine = noise_bf16(NUM_TOKENS * m.size, 0.7f);
    m.embeddings = malloc(sizeof(float) * (size_t)(NUM_TOKENS * m.hidden_size));
    for (int64_t i = 0; i < NUM_TOKENS * m.hidden_size; i++) m.embeddings[i] = noise();
    return m;
}

static bf16 *make_cache(const test_model *m) {
    return zeros(2 * NUM_BLOCKS * BLOCK_SIZE * m->num_kv_heads * m->size);
}

/* One step over tokens [first, end) of the text, in a cache that holds those before; after another row if `beside`. */
static void run_step(const test_model *m, bf16 *const *keys, bf16 *const *values, int64_t first, int64_t end,
                     int beside, int num_threads, float *out) {
    static const int64_t other_blocks[] = {14, 13};
    int64_t other = beside ? 5 : 0, num_tokens = other + end - first, block_ids[7], slots[NUM_TOKENS + 5];
    memcpy(block_ids, BLOCKS, sizeof BLOCKS);
    memcpy(block_ids + 5, other_blocks, sizeof other_blocks);
    row_span rows[2] = {{0, other, 0, 5}, {other, end - first, first, 0}};
    float *residual = malloc(sizeof(float) * (size_t)(num_tokens * m->hidden_size));
    bf16 *cosine = zeros(2 * num_tokens * m->size), *sine = zeros(2 * num_tokens * m->size);
    for (int64_t i = 0; i < num_tokens; i++) {
        int64_t position = i < other ? i : first + i - other;
        const int64_t *blocks = i < other ? other_blocks : BLOCKS;
        slots[i] = blocks[position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE;
        memcpy(residual + i * m->hidden_size, m->embeddings + position * m->hidden_size,
               sizeof(float) * (size_t)m->hidden_size);
        memcpy(cosine + i * m->size, m->cosine + position * m->size, 2 * (size_t)m->size);
        memcpy(sine + i * m->size, m->sine + position * m->size, 2 * (size_t)m->size);
    }
    decoder_step step = {rows + !beside, block_ids, slots, keys, values, cosine, sine, 1 + beside, num_tokens, BLOCK_SIZE};
    const decoder_layer *layer = m->layers;
    int64_t scratch_bytes = 0;
    const linear *products[] = {&layer->qkv, &layer->out, &layer->gate_up, &layer->down};
    for (int i = 0; i < 4; i++)
        scratch_bytes = larger(scratch_bytes, EXPORT_NAME(scratch_bytes)(num_tokens, products[i]->num_in, products[i]->is_int8));
    decoder_buffers buffers = {residual,
                               zeros(2 * num_tokens * m->hidden_size),
                               zeros(2 * num_tokens * layer->qkv.num_out),
                               zeros(2 * num_tokens * layer->out.num_in),
                               zeros(2 * num_tokens * m->intermediate_size),
                               zeros(scratch_bytes + 1)};
    EXPORT_NAME(decode)(m->layers, NUM_LAYERS, &step, num_threads, &buffers);
    memcpy(out + first * m->hidden_size, residual + other * m->hidden_size,
           sizeof(float) * (size_t)((end - first) * m->hidden_size));
    free(residual), free(cosine), free(sine), free(buffers.normed), free(buffers.heads), free(buffers.attended);
    free(buffers.gated), free(buffers.inputs);
}

static float *run_steps(const test_model *m, const int64_t *ends, int num_steps, int beside, int num_threads) {
    bf16 *keys[NUM_LAYERS], *values[NUM_LAYERS];
    for (int l = 0; l < NUM_LAYERS; l++) keys[l] = make_cache(m), values[l] = make_cache(m);
    float *out = malloc(sizeof(float) * (size_t)(NUM_TOKENS * m->hidden_size));
    for (int i = 0; i < num_steps; i++)
        run_step(m, keys, values, i ? ends[i - 1] : 0, ends[i], beside, num_threads, out);
    for (int l = 0; l < NUM_LAYERS; l++) free(keys[l]), free(values[l]);
    return out;
}

static void exact_product(const test_layer *t, const double *x, double *out) {
    for (int64_t o = 0; o < t->layer.num_out; o++) {
        out[o] = t->layer.bias ? t->layer.bias[o] : 0;
        for (int64_t i = 0; i < t->layer.num_in; i++) out[o] += t->weight[o * t->layer.num_in + i] * x[i];
    }
}

static void exact_norm(const double *x, const bf16 *weight, double epsilon, int64_t size, double *out) {
    double squares = 0;
    for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
    for (int64_t i = 0; i < size; i++) out[i] = x[i] / sqrt(squares / (double)size + epsilon) * bf16_to_float(weight[i]);
}

/* Norms a head where the layer does, and applies rotary embedding. */
static void exact_head(const test_model *m, const bf16 *weight, double epsilon, int64_t position, double *head) {
    double normed[64];
    memcpy(normed, head, sizeof(double) * (size_t)m->size);
    if (weight) exact_norm(head, weight, epsilon, m->size, normed);
    for (int64_t i = 0; i < m->size; i++) {
        double other = i < m->size / 2 ? -normed[i + m->size / 2] : normed[i - m->size / 2];
        head[i] = normed[i] * bf16_to_float(m->cosine[position * m->size + i]) +
                  other * bf16_to_float(m->sine[position * m->size + i]);
    }
}

/* Attention of all tokens; heads [NUM_TOKENS, stride] of queries, keys and values. */
static void exact_attention(const test_model *m, const decoder_layer *layer, const double *heads, int64_t position,
                            int64_t head, double *out) {
    int64_t stride = layer->qkv.num_out, kv_head = head / (m->num_heads / m->num_kv_heads);
    int64_t first = layer->window && position >= layer->window ? position + 1 - layer->window : 0;
    const double *query = heads + position * stride + head * m->size;
    double weights = 0;
    for (int64_t i = 0; i < m->size; i++) out[i] = 0;
    for (int64_t k = first; k <= position; k++) {
        const double *key = heads + k * stride + (m->num_heads + kv_head) * m->size;
        double score = 0;
        for (int64_t i = 0; i < m->size; i++) score += query[i] * key[i];
        double weight = exp(score * (double)layer->scale);
        weights += weight;
        for (int64_t i = 0; i < m->size; i++) out[i] += weight * key[m->num_kv_heads * m->size + i];
    }
    for (int64_t i = 0; i < m->size; i++) out[i] /= weights;
}

static double *exact_decode(const test_model *m) {
    int64_t stride = m->layers[0].qkv.num_out, hidden = m->hidden_size;
    double *x = malloc(sizeof(double) * (size_t)(NUM_TOKENS * hidden)), normed[256], wide[512], product[512];
    double *heads = malloc(sizeof(double) * (size_t)(NUM_TOKENS * stride));
    for (int64_t i = 0; i < NUM_TOKENS * hidden; i++) x[i] = m->embeddings[i];
    for (int l = 0; l < NUM_LAYERS; l++) {
        const decoder_layer *layer = &m->layers[l];
        for (int64_t t = 0; t < NUM_TOKENS; t++) {
            exact_norm(x + t * hidden, layer->input_norm, layer->input_epsilon, hidden, normed);
            exact_product(&m->qkv[l], normed, heads + t * stride);
            for (int64_t h = 0; h < m->num_heads + m->num_kv_heads; h++)
                exact_head(m, h < m->num_heads ? layer->query_norm : layer->key_norm, 1e-6, t,
                           heads + t * stride + h * m->size);
        }
        for (int64_t t = 0; t < NUM_TOKENS; t++) {
            for (int64_t h = 0; h < m->num_heads; h++) exact_attention(m, layer, heads, t, h, wide + h * m->size);
            exact_product(&m->out[l], wide, product);
            for (int64_t i = 0; i < hidden; i++) x[t * hidden + i] += product[i];
            exact_norm(x + t * hidden, layer->mlp_norm, layer->mlp_epsilon, hidden, normed);
            exact_product(&m->gate_up[l], normed, wide);
            for (int64_t i = 0; i < m->intermediate_size; i++) { /* runs of LANES gates and what they are for */
                double gate = wide[i / LANES * 2 * LANES + i % LANES], up = wide[i / LANES * 2 * LANES + LANES + i % LANES];
                product[i] = gate / (1 + exp(-gate)) * up;
            }
            exact_product(&m->down[l], product, wide);
            for (int64_t i = 0; i < hidden; i++) x[t * hidden + i] += wide[i];
        }
    }
    free(heads);
    return x;
}

static void check_model(int is_int8, int has_head_norms, int64_t window) {
    static const int64_t whole[] = {NUM_TOKENS}, chunks[] = {17, 18, 19, 52, 53, NUM_TOKENS};
    test_model m = make_model(is_int8, has_head_norms, window);
    float *at_once = run_steps(&m, whole, 1, 0, 1), *chunked = run_steps(&m, chunks, 6, 0, 3);
    float *beside = run_steps(&m, whole, 1, 1, 2);
    double *exact = exact_decode(&m), error = 0, size = 0;
    for (int64_t i = 0; i < NUM_TOKENS * m.hidden_size; i++) {
        error += pow(at_once[i] - exact[i], 2);
        size += pow(exact[i] - m.embeddings[i], 2);
    }
    size_t bytes = sizeof(float) * (size_t)(NUM_TOKENS * m.hidden_size);
    expect(sqrt(error / size) < (is_int8 ? 0.05 : 0.02), "a model is near", is_int8, has_head_norms, window);
    expect(!memcmp(at_once, chunked, bytes), "a model is the same in chunks", is_int8, has_head_norms, window);
    expect(!memcmp(at_once, beside, bytes), "a model is the same beside another row", is_int8, has_head_norms, window);
    free(at_once), free(chunked), free(beside), free(exact);
}

#define VOCAB_SIZE 1003
#define NUM_POSITIONS 9

/* cllm_core.engine.noise.mix32 and gumbel_noise */
static uint32_t exact_mix(uint32_t word) {
    word = (word ^ word >> 16) * 0x21f0aaadu;
    word = (word ^ word >> 15) * 0x735a2d97u;
    return word ^ word >> 15;
}

static double exact_noise(const int64_t *keys, int64_t token) {
    uint32_t word = exact_mix((uint32_t)token + 1) * ((uint32_t)(keys[0] >> 1) | 1) ^ (uint32_t)keys[1];
    return -log(-log1p(-(exact_mix(word) + 0.5) * 0x1p-32));
}

/* Tokens at temperature 1 of the same positions with all tokens allowed, and with the likeliest one. */
static void check_sampling(int num_threads) {
    float *logits = malloc(sizeof(float) * NUM_POSITIONS * VOCAB_SIZE), temperature[NUM_POSITIONS];
    int64_t positions[NUM_POSITIONS], keys[2 * NUM_POSITIONS], top_k[NUM_POSITIONS];
    int64_t drawn[NUM_POSITIONS], highest[NUM_POSITIONS], largest[NUM_POSITIONS];
    for (int64_t i = 0; i < NUM_POSITIONS * VOCAB_SIZE; i++) logits[i] = 3 * noise();
    for (int64_t i = 0; i < NUM_POSITIONS; i++) {
        positions[i] = i, temperature[i] = 1, top_k[i] = 1;
        keys[2 * i] = (int64_t)exact_mix((uint32_t)i), keys[2 * i + 1] = (int64_t)exact_mix((uint32_t)i + 100);
        logits[i * VOCAB_SIZE + 7] = logits[i * VOCAB_SIZE + 900] = 20 * (i % 2); /* equal ones, the largest or not */
    }
    float *scratch = zeros((int64_t)sizeof(float) * num_threads * EXPORT_NAME(draw_scratch_size)(VOCAB_SIZE));
    draw_call call = {.logits = logits, .stride = VOCAB_SIZE, .vocab_size = VOCAB_SIZE, .positions = positions, .keys = keys,
                      .temperature = temperature, .num_rows = NUM_POSITIONS, .scratch = scratch, .out = drawn};
    EXPORT_NAME(draw)(&call, num_threads);
    call.top_k = top_k, call.out = highest;
    EXPORT_NAME(draw)(&call, num_threads);
    EXPORT_NAME(largest)(logits, VOCAB_SIZE, VOCAB_SIZE, NUM_POSITIONS, num_threads, largest);
    for (int64_t i = 0; i < NUM_POSITIONS; i++) {
        const float *row = logits + i * VOCAB_SIZE;
        int64_t likeliest = 0, noisy = 0;
        for (int64_t id = 1; id < VOCAB_SIZE; id++) {
            if (row[id] > row[likeliest]) likeliest = id;
            if (row[id] + exact_noise(keys + 2 * i, id) > row[noisy] + exact_noise(keys + 2 * i, noisy)) noisy = id;
        }
        expect(largest[i] == likeliest, "the largest logit", i, largest[i], likeliest);
        expect(highest[i] == likeliest, "a token of one allowed", i, highest[i], likeliest);
        expect(drawn[i] == noisy, "a token drawn", i, drawn[i], noisy);
    }
    free(logits), free(scratch);
}

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

int main(void) {
    if (!cllm_supports(TEXT(ISA))) {
        printf("this processor has no %s\n", TEXT(ISA));
        return 77;
    }
    for (int64_t tokens = 1; tokens <= 40; tokens += tokens < 20 ? 1 : 9) check_product(tokens, 70, 64, 0);
    check_product(300, 64, 96, 0);
    for (int use_dot = 1; use_dot >= 0; use_dot--) {
        cllm_use_dot_products(use_dot);
        for (int64_t tokens = 1; tokens <= 40; tokens += tokens < 20 ? 1 : 9) check_product(tokens, 192, 64, 1);
        check_model(1, use_dot, 0);
    }
    for (int64_t size = 16; size <= 96; size += 16) check_norm_and_rope(size);
    check_model(0, 0, 0);
    check_model(0, 1, 20);
    check_sampling(1), check_sampling(3);
    printf("%d of %d checks failed\n", num_wrong, num_checks);
    return num_wrong > 0;
}
