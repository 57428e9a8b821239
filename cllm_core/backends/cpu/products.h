/* Matrix products: linear layers and the output layer, in bfloat16 or 8 bits.
 *
 * An instruction set brings two tile functions and what they need (tiles_*.h):
 *     BF16_ROWS, INT8_ROWS     the most tokens of a tile
 *     bf16_input               what bfloat16 inputs are read as: bf16, where they are; or float, packed by tiles as
 *                              [num_in][rows], so that what is read together lies together
 *     bf16_tile, int8_tile     sums [rows][PANEL] float32 of the products of `rows` tokens and one panel, by weights
 *                              prefetched PREFETCH_AHEAD bytes before they are read
 *     begin_tiles, end_tiles   called by each thread around products for num_tokens
 * A sum runs in the same order whatever else is computed with it, so that a token's numbers are the same in any batch.
 */

#include "kernels.h"

#define BLOCK_ROWS 256         /* tokens, about, whose inputs stay in the second cache */
#define GROUP_BYTES (1 << 18) /* panels, likewise, that all of these tokens are multiplied by in turn */
#define GROUPS_PER_THREAD 4   /* at least, so that threads can share them out */

/* What becomes of a product. */
typedef enum { STORE, STORE_FLOAT, ADD, GATE } use;

static inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

static inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

static inline int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

static inline int reads_floats(void) { return sizeof(bf16_input) == sizeof(float); }

/* Bytes of a token's inputs as tiles read them. */
static inline int64_t input_bytes(int64_t num_in, int64_t is_int8) {
    return is_int8 ? int8_row_bytes(num_in / INT8_GROUP) : num_in * (int64_t)sizeof(bf16_input);
}

static inline int64_t panel_bytes(const linear *layer) {
    return layer->is_int8 ? layer->num_in / INT8_GROUP * (int64_t)sizeof(weight_group)
                          : divide_up(layer->num_in, INPUT_UNIT) * INPUT_UNIT * PANEL * (int64_t)sizeof(bf16);
}

/* Tokens of every tile of a product: as many passes as there have to be, of about the same size. The last one begins
 * with tokens that the one before it has computed too. */
static inline int64_t rows_per_tile(int64_t num_tokens, int64_t most_rows) {
    return num_tokens ? divide_up(num_tokens, divide_up(num_tokens, most_rows)) : 0;
}

static inline vec rounded(vec x) { return x + 12582912.0f; } /* 1.5 * 2^23: the last bits are the number, ties to even */

/* x [num_groups, INT8_GROUP] in 8 bits. */
static void quantise_token(const bf16 *x, int64_t num_groups, int8_t *out) {
    for (int64_t g = 0; g < num_groups; g++, x += INT8_GROUP) {
        vec top = {0};
        for (int i = 0; i < INT8_GROUP; i += WIDTH) top = maximum(top, absolute(load_bf16(x + i)));
        float largest = reduce_max(top), inverse = largest > 0.0f ? 127.0f / largest : 0.0f, scaled[INT8_GROUP];
        for (int i = 0; i < INT8_GROUP; i += WIDTH) store(scaled + i, load_bf16(x + i) * inverse);
        __asm__ volatile("" : : "r"(scaled) : "memory"); /* or the compiler makes one operation, one rounding, of both */
        ivec total = {0};
        typedef int8_t bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
        for (int i = 0; i < INT8_GROUP; i += WIDTH) {
            ivec numbers = (ivec)rounded(load(scaled + i)) - (ivec)rounded((vec){0});
            *(bytes *)(out + g * INT8_GROUP + i) = __builtin_convertvector(numbers, bytes);
            total += numbers;
        }
        int32_t offset = 0;
        for (int i = 0; i < WIDTH; i++) offset += 128 * total[i];
        input_scales(out, num_groups)[g] = largest / 127.0f;
        input_offsets(out, num_groups)[g] = offset;
    }
}

/* x [num_in] as float32, where tiles of the product for num_tokens read it. A token that the last tile computes again is
 * in two places. */
static void pack_token(const bf16 *x, int64_t token, int64_t num_tokens, int64_t num_in, float *out) {
    int64_t rows = rows_per_tile(num_tokens, BF16_ROWS), last = num_tokens - rows;
    float *to = out + token / rows * rows * num_in + token % rows;
    if (token / rows * rows <= last)
        for (int64_t k = 0; k < num_in; k++) to[k * rows] = bf16_to_float(x[k]);
    if (token < last || last % rows == 0) return;
    to = out + divide_up(last, rows) * rows * num_in + token - last;
    for (int64_t k = 0; k < num_in; k++) to[k * rows] = bf16_to_float(x[k]);
}

/* Whether a product reads its inputs from a scratch buffer, where convert_token has written them; else where they are. */
static inline int converts_inputs(const linear *layer) { return layer->is_int8 || reads_floats(); }

static void convert_token(const linear *layer, const bf16 *x, int64_t token, int64_t num_tokens, void *scratch) {
    x += token * layer->num_in;
    if (layer->is_int8)
        quantise_token(x, layer->num_in / INT8_GROUP, (int8_t *)scratch + token * input_bytes(layer->num_in, 1));
    else if (reads_floats())
        pack_token(x, token, num_tokens, layer->num_in, scratch);
}

/* Items of loops over tokens: as many at once as make some microseconds of work of `size` numbers each. */
typedef struct {
    int64_t first, end;
} token_range;

static inline int64_t tokens_at_once(int64_t size) { return larger(1, 4096 / size); }

static inline int64_t num_token_items(int64_t num_tokens, int64_t size) {
    return divide_up(num_tokens, tokens_at_once(size));
}

static inline token_range item_tokens(int64_t item, int64_t num_tokens, int64_t size) {
    int64_t first = item * tokens_at_once(size);
    return (token_range){first, smaller(num_tokens, first + tokens_at_once(size))};
}

typedef struct {
    const linear *layer;
    const bf16 *x;
    int64_t num_tokens;
    void *scratch;
} conversion;

static void convert_items(member *me, void *argument) {
    const conversion *c = argument;
    for (int64_t item; (item = next_item(me)) >= 0;) {
        token_range tokens = item_tokens(item, c->num_tokens, c->layer->num_in);
        for (int64_t t = tokens.first; t < tokens.end; t++) convert_token(c->layer, c->x, t, c->num_tokens, c->scratch);
    }
}

/* x [T, num_in] as the layer's product reads it: converted in `scratch`, or x itself. */
static const void *to_inputs(team *t, const linear *layer, const bf16 *x, int64_t num_tokens, void *scratch) {
    if (!converts_inputs(layer)) return x;
    conversion c = {layer, x, num_tokens, scratch};
    run_items(t, num_token_items(num_tokens, layer->num_in), convert_items, &c);
    return scratch;
}

/* What is added to some rows of a product before it is used. */
typedef struct {
    const int64_t *places; /* [T] where a row's numbers are in `numbers`, or -1; null: no row has any */
    const float *numbers;  /* [places][num_out] */
} addition;

/* Uses the sums of a row with the panel that begins at `column`. GATE: a panel is LANES gates, then what they are for. */
static inline void use_sums(const linear *layer, use what, const addition *more, float *sums, int64_t row,
                            int64_t column, void *out) {
    const float *bias = layer->bias ? layer->bias + column : 0;
    if (more->places && more->places[row] >= 0) {
        const float *added = more->numbers + more->places[row] * layer->num_out + column;
        for (int i = 0; i < PANEL; i += WIDTH) store(sums + i, load(sums + i) + load(added + i));
    }
    if (what == GATE) {
        bf16 *to = (bf16 *)out + row * (layer->num_out / 2) + column / 2;
        for (int i = 0; i < LANES; i += WIDTH) {
            vec gate = load(sums + i), up = load(sums + LANES + i);
            if (bias) gate += load(bias + i), up += load(bias + LANES + i);
            store_bf16(to + i, silu(gate) * up);
        }
        return;
    }
    for (int i = 0; i < PANEL; i += WIDTH) {
        int64_t place = row * layer->num_out + column + i;
        vec value = load(sums + i);
        if (bias) value += load(bias + i);
        if (what == STORE) store_bf16((bf16 *)out + place, value);
        if (what == STORE_FLOAT) store((float *)out + place, value);
        if (what == ADD) store((float *)out + place, load((float *)out + place) + value);
    }
}

/* A product, whose items are groups of panels times blocks of tokens that stay in the second cache. */
typedef struct {
    use what;
    const linear *layer;
    const char *inputs; /* of to_inputs */
    int64_t num_tokens;
    addition more;
    void *out;
    int64_t rows;                   /* of a tile */
    int64_t block_rows, num_blocks; /* tokens of a block, the last one having more */
    int64_t group, num_groups;      /* panels of a group, the last one having fewer */
} product;

static product make_product(const team *t, use what, const linear *layer, const void *inputs, int64_t num_tokens,
                            addition more, void *out) {
    product p = {
        .what = what, .layer = layer, .inputs = inputs, .num_tokens = num_tokens, .more = more, .out = out};
    int64_t num_panels = layer->num_out / PANEL;
    p.rows = rows_per_tile(num_tokens, layer->is_int8 ? INT8_ROWS : BF16_ROWS);
    if (!p.rows) return p;
    p.block_rows = larger(1, BLOCK_ROWS / p.rows) * p.rows;
    p.num_blocks = larger(1, num_tokens / p.block_rows);
    int64_t shared_out = num_panels / (GROUPS_PER_THREAD * team_size(t));
    p.group = num_tokens == p.rows ? 1 : larger(1, smaller(GROUP_BYTES / panel_bytes(layer), shared_out));
    p.num_groups = divide_up(num_panels, p.group);
    return p;
}

ALWAYS_INLINE void multiply_item(use what, const product *p, int64_t item) {
    const linear *layer = p->layer;
    int64_t row_bytes = input_bytes(layer->num_in, layer->is_int8), bytes = panel_bytes(layer);
    int64_t block = item / p->num_groups, first_panel = item % p->num_groups * p->group;
    int64_t end_panel = smaller(layer->num_out / PANEL, first_panel + p->group);
    int64_t first_row = block * p->block_rows;
    int64_t end_row = block + 1 < p->num_blocks ? first_row + p->block_rows : p->num_tokens;
    float sums[(BF16_ROWS > INT8_ROWS ? BF16_ROWS : INT8_ROWS) * PANEL];
    for (int64_t done = first_row; done < end_row; done += p->rows) {
        int64_t row = smaller(done, end_row - p->rows); /* of the tile; those before `done` are in the last one too */
        prefetch how = done == first_row ? processor.prefetch : PREFETCH_NOTHING;
        for (int64_t index = first_panel; index < end_panel; index++) {
            const char *panel = (const char *)layer->panels + index * bytes;
            if (layer->is_int8)
                int8_tile((const int8_t *)p->inputs + row * row_bytes, (const weight_group *)panel, how,
                          layer->num_in / INT8_GROUP, (int)p->rows, sums);
            else
                bf16_tile((const bf16_input *)(p->inputs + (reads_floats() ? done : row) * row_bytes),
                          (const bf16 *)panel, how, layer->num_in, (int)p->rows, sums);
            for (int64_t i = done; i < smaller(done + p->rows, end_row); i++)
                use_sums(layer, what, &p->more, sums + (i - row) * PANEL, i, index * PANEL, p->out);
        }
    }
}

static void multiply_items(member *me, void *argument) {
    product p = *(const product *)argument;
    begin_tiles(p.num_tokens);
    for (int64_t item; (item = next_item(me)) >= 0;)
        switch (p.what) {
            case STORE: multiply_item(STORE, &p, item); break;
            case STORE_FLOAT: multiply_item(STORE_FLOAT, &p, item); break;
            case ADD: multiply_item(ADD, &p, item); break;
            case GATE: multiply_item(GATE, &p, item); break;
        }
    end_tiles();
}

/* STORE: bf16 out [T, num_out] = the product; STORE_FLOAT: float; ADD: float out += the product; GATE: bf16
 * out [T, num_out / 2] = silu(gates) * the others, which alternate in runs of LANES outputs. */
static void multiply_and_add(team *t, use what, const linear *layer, const void *inputs, int64_t num_tokens,
                             addition more, void *out) {
    product p = make_product(t, what, layer, inputs, num_tokens, more, out);
    run_items(t, p.num_blocks * p.num_groups, multiply_items, &p);
}

static void multiply(team *t, use what, const linear *layer, const void *inputs, int64_t num_tokens, void *out) {
    multiply_and_add(t, what, layer, inputs, num_tokens, (addition){0}, out);
}

static void run_product(int num_threads, use what, const linear *layer, const bf16 *x, int64_t num_tokens,
                        void *scratch, void *out) {
    team *t = begin_team(num_threads);
    multiply(t, what, layer, to_inputs(t, layer, x, num_tokens, scratch), num_tokens, out);
    end_team(t);
}

/* Bytes that a product's inputs take in the scratch buffer; 0 where bfloat16 ones are read where they are. */
int64_t EXPORT(scratch_bytes)(int64_t num_tokens, int64_t num_in, int64_t is_int8) {
    int64_t rows = rows_per_tile(num_tokens, BF16_ROWS);
    if (is_int8) return num_tokens * input_bytes(num_in, 1);
    return reads_floats() && rows ? divide_up(num_tokens, rows) * rows * input_bytes(num_in, 0) : 0;
}

/* out [T, num_out] of x [T, num_in]; num_in is even, or of int8 weights a multiple of INT8_GROUP, num_out of PANEL. */
void EXPORT(linear)(const linear *layer, const bf16 *x, int64_t num_tokens, int num_threads, void *scratch, bf16 *out) {
    run_product(num_threads, STORE, layer, x, num_tokens, scratch, out);
}

/* The same with float32 results. */
void EXPORT(logits)(const linear *layer, const bf16 *x, int64_t num_tokens, int num_threads, void *scratch, float *out) {
    run_product(num_threads, STORE_FLOAT, layer, x, num_tokens, scratch, out);
}
