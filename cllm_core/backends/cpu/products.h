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

/* By each member, for its own part of the tokens: x [T, num_in] in 8 bits, [T] rows of int8_row_bytes. */
static void quantise(member *me, const bf16 *x, int64_t num_tokens, int64_t num_in, int8_t *out) {
    int64_t num_groups = num_in / INT8_GROUP;
    range tokens = own_range(me, num_tokens);
    for (int64_t index = tokens.first * num_groups; index < tokens.end * num_groups; index++) {
        const bf16 *in = x + index * INT8_GROUP;
        int8_t *row = out + index / num_groups * int8_row_bytes(num_groups), *to = row + index % num_groups * INT8_GROUP;
        vec top = {0};
        for (int i = 0; i < INT8_GROUP; i += WIDTH) top = maximum(top, absolute(load_bf16(in + i)));
        float largest = reduce_max(top), inverse = largest > 0.0f ? 127.0f / largest : 0.0f, scaled[INT8_GROUP];
        for (int i = 0; i < INT8_GROUP; i += WIDTH) store(scaled + i, load_bf16(in + i) * inverse);
        __asm__ volatile("" : : "r"(scaled) : "memory"); /* or the compiler makes one operation, one rounding, of both */
        ivec total = {0};
        typedef int8_t bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
        for (int i = 0; i < INT8_GROUP; i += WIDTH) {
            ivec numbers = (ivec)rounded(load(scaled + i)) - (ivec)rounded((vec){0});
            *(bytes *)(to + i) = __builtin_convertvector(numbers, bytes);
            total += numbers;
        }
        int32_t offset = 0;
        for (int i = 0; i < WIDTH; i++) offset += 128 * total[i];
        input_scales(row, num_groups)[index % num_groups] = largest / 127.0f;
        input_offsets(row, num_groups)[index % num_groups] = offset;
    }
}

/* By each member, for its own part of the tokens: x [T, num_in] as float32, packed by tiles. Tokens that the last tile
 * computes again are in both. */
static void pack_floats(member *me, const bf16 *x, int64_t num_tokens, int64_t num_in, float *out) {
    int64_t rows = rows_per_tile(num_tokens, BF16_ROWS), last = num_tokens - rows;
    range tokens = own_range(me, num_tokens);
    for (int64_t token = tokens.first; token < tokens.end; token++) {
        const bf16 *in = x + token * num_in;
        float *to = out + token / rows * rows * num_in + token % rows;
        if (token / rows * rows <= last)
            for (int64_t k = 0; k < num_in; k++) to[k * rows] = bf16_to_float(in[k]);
        if (token < last || last % rows == 0) continue;
        to = out + divide_up(last, rows) * rows * num_in + token - last;
        for (int64_t k = 0; k < num_in; k++) to[k * rows] = bf16_to_float(in[k]);
    }
}

/* By each member, for its own part of the tokens: x as the layer's product reads it. It is written to `scratch`, or x
 * itself where tiles read bfloat16. */
static const void *to_inputs(member *me, const linear *layer, const bf16 *x, int64_t num_tokens, void *scratch) {
    if (layer->is_int8)
        quantise(me, x, num_tokens, layer->num_in, scratch);
    else if (reads_floats())
        pack_floats(me, x, num_tokens, layer->num_in, scratch);
    else
        return x;
    return scratch;
}

/* Uses the sums of a row with the panel that begins at `column`. GATE: a panel is LANES gates, then what they are for. */
static inline void use_sums(const linear *layer, use what, const float *sums, int64_t row, int64_t column, void *out) {
    const float *bias = layer->bias ? layer->bias + column : 0;
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

/* A product's part that stays in the second cache: tiles of rows [first_row, end_row) with panels [first, end). */
typedef struct {
    int64_t first_row, end_row, rows, first_panel, end_panel;
} tile_block;

ALWAYS_INLINE void multiply_block(use what, const linear *layer, const char *inputs, tile_block block, void *out) {
    int64_t row_bytes = input_bytes(layer->num_in, layer->is_int8), bytes = panel_bytes(layer);
    float sums[(BF16_ROWS > INT8_ROWS ? BF16_ROWS : INT8_ROWS) * PANEL];
    for (int64_t done = block.first_row; done < block.end_row; done += block.rows) {
        int64_t row = smaller(done, block.end_row - block.rows);
        prefetch how = done == block.first_row ? processor.prefetch : PREFETCH_NOTHING;
        for (int64_t p = block.first_panel; p < block.end_panel; p++) {
            const char *panel = (const char *)layer->panels + p * bytes;
            if (layer->is_int8)
                int8_tile((const int8_t *)inputs + row * row_bytes, (const weight_group *)panel, how,
                          layer->num_in / INT8_GROUP, (int)block.rows, sums);
            else
                bf16_tile((const bf16_input *)(inputs + (reads_floats() ? done : row) * row_bytes), (const bf16 *)panel,
                          how, layer->num_in, (int)block.rows, sums);
            for (int64_t i = done; i < smaller(done + block.rows, block.end_row); i++)
                use_sums(layer, what, sums + (i - row) * PANEL, i, p * PANEL, out);
        }
    }
}

ALWAYS_INLINE void multiply_and(member *me, use what, const linear *layer, const void *inputs, int64_t num_tokens,
                                void *out) {
    int64_t rows = rows_per_tile(num_tokens, layer->is_int8 ? INT8_ROWS : BF16_ROWS);
    if (!rows) return;
    int64_t block_rows = larger(1, BLOCK_ROWS / rows) * rows, num_blocks = larger(1, num_tokens / block_rows);
    int64_t num_panels = layer->num_out / PANEL;
    int64_t group = num_tokens == rows ? 1 : larger(1, smaller(GROUP_BYTES / panel_bytes(layer),
                                                              num_panels / (GROUPS_PER_THREAD * me->num_threads)));
    int64_t num_groups = divide_up(num_panels, group);
    for (int64_t item; (item = next_item(me, num_blocks * num_groups)) >= 0;) {
        int64_t index = item / num_groups, first = item % num_groups * group;
        tile_block block = {index * block_rows, index + 1 < num_blocks ? (index + 1) * block_rows : num_tokens, rows,
                            first, smaller(num_panels, first + group)};
        multiply_block(what, layer, inputs, block, out);
    }
}

/* out [T, num_out] = the product; inputs: of to_inputs. */
static void multiply(member *me, const linear *layer, const void *inputs, int64_t num_tokens, bf16 *out) {
    multiply_and(me, STORE, layer, inputs, num_tokens, out);
}

/* out [T, num_out] += the product. */
static void multiply_add(member *me, const linear *layer, const void *inputs, int64_t num_tokens, float *out) {
    multiply_and(me, ADD, layer, inputs, num_tokens, out);
}

/* out [T, num_out / 2] = silu(gates) * the others, which lie in turns of LANES outputs. */
static void multiply_gated(member *me, const linear *layer, const void *inputs, int64_t num_tokens, bf16 *out) {
    multiply_and(me, GATE, layer, inputs, num_tokens, out);
}

typedef struct {
    const linear *layer;
    const bf16 *x;
    int64_t num_tokens, is_float;
    void *scratch, *out;
} product;

static void run_product(member *me, void *argument) {
    const product *p = argument;
    begin_tiles(p->num_tokens);
    const void *inputs = to_inputs(me, p->layer, p->x, p->num_tokens, p->scratch);
    if (inputs == p->scratch) team_barrier(me);
    if (p->is_float)
        multiply_and(me, STORE_FLOAT, p->layer, inputs, p->num_tokens, p->out);
    else
        multiply(me, p->layer, inputs, p->num_tokens, p->out);
    end_tiles();
}

/* Bytes that a product's inputs take in the scratch buffer; 0 where bfloat16 ones are read where they are. */
int64_t EXPORT(scratch_bytes)(int64_t num_tokens, int64_t num_in, int64_t is_int8) {
    int64_t rows = rows_per_tile(num_tokens, BF16_ROWS);
    if (is_int8) return num_tokens * input_bytes(num_in, 1);
    return reads_floats() && rows ? divide_up(num_tokens, rows) * rows * input_bytes(num_in, 0) : 0;
}

/* out [T, num_out] of x [T, num_in]; num_in is even, or of int8 weights a multiple of INT8_GROUP, num_out of PANEL. */
void EXPORT(linear)(const linear *layer, const bf16 *x, int64_t num_tokens, int num_threads, void *scratch, bf16 *out) {
    product p = {layer, x, num_tokens, 0, scratch, out};
    run_team(num_threads, run_product, &p);
}

/* The same with float32 results. */
void EXPORT(logits)(const linear *layer, const bf16 *x, int64_t num_tokens, int num_threads, void *scratch, float *out) {
    product p = {layer, x, num_tokens, 1, scratch, out};
    run_team(num_threads, run_product, &p);
}
