/* Choosing tokens as cllm_core/engine/sampling.py defines it: the likeliest, or at random, with temperature, top-k, top-p,
 * min-p and noise in one pass over a position's logits. A position is computed by one thread, so that its token does not
 * depend on the batch. */

#include "kernels.h"

#include <float.h>
#include <math.h>

#define BLOCK 64             /* tokens whose largest score is kept */
#define BLOCKS_A_SUM 16      /* summed in float32 */
#define FEW_CANDIDATES 512   /* that are picked out one by one */
#define MAX_HALVINGS 16
#define LARGEST_NOISE 23.0f  /* above -log(2^-33) */
#define LARGEST_BELOW_ONE 0x1.fffffep-1f

typedef struct {
    const float *logits; /* [positions, stride] */
    int64_t stride, vocab_size;
    const int64_t *positions, *keys; /* [num_rows], [num_rows, 2] */
    const float *temperature;        /* [num_rows], as the following, which may be null */
    const int64_t *top_k;
    const float *top_p, *min_p;
    int64_t num_rows;
    float *scratch; /* draw_scratch_size for each thread */
    int64_t *out;   /* [num_rows] */
} draw_call;

/* A score and what counts for it: its probability times some constant, or 1. */
typedef struct {
    float score, weight;
} candidate;

/* Tokens may be chosen whose score is larger, or equal and their id below tie_end. */
typedef struct {
    float score;
    int64_t tie_end;
} floor_of_scores;

/* A thread's part of the scratch buffer; scores are padded to whole blocks by -inf. weights: e^score. */
typedef struct {
    float *scores, *weights, *block_max;
    candidate *candidates;
    int64_t size, num_blocks;
} draw_scratch;

/* Scores low <= s < high, and what scores from `high` on weigh. */
typedef struct {
    float low, high;
    double above;
} band;

static int64_t num_blocks_of(int64_t vocab_size) { return (vocab_size + BLOCK - 1) / BLOCK; }

static int64_t scratch_size(int64_t vocab_size) { return num_blocks_of(vocab_size) * (4 * BLOCK + 2); }

static draw_scratch scratch_of(float *memory, int64_t vocab_size) {
    int64_t num_blocks = num_blocks_of(vocab_size), padded = num_blocks * BLOCK;
    candidate *candidates = (candidate *)memory;
    float *scores = (float *)(candidates + padded);
    return (draw_scratch){scores, scores + padded, scores + 2 * padded, candidates, vocab_size, num_blocks};
}

/* Whether a comparison holds in some lane. */
static int any_lane(ivec holds) {
    int64_t halves[WIDTH / 2], some = 0;
    memcpy(halves, &holds, sizeof halves);
    for (int i = 0; i < WIDTH / 2; i++) some |= halves[i];
    return some != 0;
}

static int may_choose(float score, int64_t id, floor_of_scores floor) {
    return score > floor.score || (score == floor.score && id < floor.tie_end);
}

static float largest(const float *x, int64_t size) {
    vec top = broadcast(-INFINITY);
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) top = maximum(load(x + i), top);
    float out = reduce_max(top);
    for (; i < size; i++) out = x[i] > out ? x[i] : out;
    return out;
}

/* scores: (logit - largest logit) / temperature. */
static void write_scores(const float *logits, float top, float temperature, draw_scratch *s) {
    int64_t i = 0;
    for (; i + WIDTH <= s->size; i += WIDTH) store(s->scores + i, (load(logits + i) - top) / temperature);
    for (; i < s->size; i++) s->scores[i] = (logits[i] - top) / temperature;
    for (; i < s->num_blocks * BLOCK; i++) s->scores[i] = -INFINITY;
    for (int64_t block = 0; block < s->num_blocks; block++)
        s->block_max[block] = largest(s->scores + block * BLOCK, BLOCK);
}

/* Writes the weights; their sum. In float64 from block to block: in float32 it would drift by more than the rarest tokens weigh. */
static double write_weights(draw_scratch *s) {
    double total = 0;
    for (int64_t block = 0; block < s->num_blocks; block++) {
        vec sum = {0};
        for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK; i += WIDTH) {
            vec weights = exp_nonpositive(load(s->scores + i));
            store(s->weights + i, weights);
            sum += weights;
        }
        total += reduce_add(sum);
    }
    return total;
}

/* What tokens of score >= cut weigh, and how many they are; without weights each weighs 1. */
static double weight_from(const draw_scratch *s, const float *weights, float cut, int64_t *count) {
    double total = 0;
    ivec num_found = {0};
    for (int64_t first = 0; first < s->num_blocks; first += BLOCKS_A_SUM) {
        int64_t end = first + BLOCKS_A_SUM < s->num_blocks ? first + BLOCKS_A_SUM : s->num_blocks;
        vec sum = {0};
        for (int64_t i = first * BLOCK; i < end * BLOCK; i += WIDTH) {
            ivec found = load(s->scores + i) >= cut;
            num_found -= found;
            if (weights) sum += (vec)((ivec)load(weights + i) & found);
        }
        total += reduce_add(sum);
    }
    *count = 0;
    for (int lane = 0; lane < WIDTH; lane++) *count += num_found[lane];
    return weights ? total : (double)*count;
}

/* The scores from `low` on, of which the target is a part, cut down to a band of few around where it is reached. */
static band narrow(const draw_scratch *s, const float *weights, float low, double target) {
    band out = {low, INFINITY, 0};
    int64_t num_low, num_high = 0, num_mid;
    weight_from(s, weights, low, &num_low);
    float high = 0; /* the largest score */
    for (int i = 0; i < MAX_HALVINGS && num_low - num_high > FEW_CANDIDATES; i++) {
        float mid = out.low + (high - out.low) / 2;
        double weight = weight_from(s, weights, mid, &num_mid);
        if (weight >= target) {
            out.low = mid;
            num_low = num_mid;
        } else {
            out.high = high = mid;
            out.above = weight;
            num_high = num_mid;
        }
    }
    return out;
}

/* Copies the tokens of a band that may be chosen to the candidates, in the order of their ids; how many. */
static int64_t collect(draw_scratch *s, const float *weights, band range, floor_of_scores floor) {
    int64_t num_found = 0;
    for (int64_t block = 0; block < s->num_blocks; block++) {
        if (s->block_max[block] < range.low) continue;
        for (int64_t first = block * BLOCK; first < (block + 1) * BLOCK; first += WIDTH) {
            vec scores = load(s->scores + first);
            if (!any_lane((scores >= range.low) & (scores < range.high))) continue;
            for (int64_t id = first; id < first + WIDTH; id++) {
                float score = s->scores[id];
                if (score >= range.low && score < range.high && may_choose(score, id, floor))
                    s->candidates[num_found++] = (candidate){score, weights ? weights[id] : 1.0f};
            }
        }
    }
    return num_found;
}

static float median(float a, float b, float c) { return a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b); }

/* The fewest candidates of the highest scores whose weights make up the target: the score of the last of them, and in
 * `num_ties` how many of that score are among them. All, with num_ties -1, where they do not make it up. */
static float select_highest(candidate *x, int64_t num_candidates, double target, int64_t *num_ties) {
    int64_t begin = 0, end = num_candidates;
    double above = 0; /* weight of those above x[begin, end) */
    while (begin < end) {
        float pivot = median(x[begin].score, x[begin + (end - begin) / 2].score, x[end - 1].score);
        int64_t larger = begin, smaller = end; /* x[begin, larger) > pivot, x[larger, i) == pivot, x[smaller, end) < pivot */
        double weight = 0, tie_weight = 0;
        for (int64_t i = begin; i < smaller;) {
            candidate one = x[i];
            if (one.score > pivot) {
                weight += one.weight;
                x[i++] = x[larger];
                x[larger++] = one;
            } else if (one.score < pivot) {
                x[i] = x[--smaller];
                x[smaller] = one;
            } else {
                tie_weight = one.weight;
                i++;
            }
        }
        int64_t ties = smaller - larger;
        if (above + weight >= target) {
            end = larger;
        } else if (above + weight + tie_weight * (double)ties >= target) {
            int64_t wanted = (int64_t)ceil((target - above - weight) / tie_weight);
            *num_ties = wanted < 1 ? 1 : wanted > ties ? ties : wanted;
            return pivot;
        } else {
            above += weight + tie_weight * (double)ties;
            begin = smaller;
        }
    }
    *num_ties = -1;
    return -INFINITY;
}

/* Raises the floor to the fewest tokens, from score `low` on, that make up the target; of equal ones the lowest ids stay. */
static floor_of_scores raise_floor(draw_scratch *s, const float *weights, float low, double target,
                                   floor_of_scores floor) {
    int64_t num_ties;
    band range = narrow(s, weights, low, target);
    int64_t num_candidates = collect(s, weights, range, floor);
    float score = select_highest(s->candidates, num_candidates, target - range.above, &num_ties);
    if (num_ties < 0) return floor;
    for (int64_t block = 0; block < s->num_blocks; block++) {
        if (s->block_max[block] < score) continue;
        for (int64_t first = block * BLOCK; first < (block + 1) * BLOCK; first += WIDTH) {
            if (!any_lane(load(s->scores + first) == score)) continue;
            for (int64_t id = first; id < first + WIDTH; id++)
                if (s->scores[id] == score && --num_ties == 0) return (floor_of_scores){score, id + 1};
        }
    }
    return floor; /* not reached: the ties were counted among these scores */
}

static floor_of_scores keep_top_k(draw_scratch *s, int64_t top_k) {
    float low = 0;
    if (top_k > s->num_blocks) {
        for (int64_t i = 0; i < s->size; i++) low = s->scores[i] < low && s->scores[i] > -INFINITY ? s->scores[i] : low;
    } else { /* the k-th largest score is no less than the k-th largest of the blocks' largest */
        int64_t ignored;
        for (int64_t i = 0; i < s->num_blocks; i++) s->candidates[i] = (candidate){s->block_max[i], 1.0f};
        low = select_highest(s->candidates, s->num_blocks, (double)top_k, &ignored);
    }
    return raise_floor(s, NULL, low, (double)top_k, (floor_of_scores){-INFINITY, 0});
}

static floor_of_scores keep_top_p(draw_scratch *s, float top_p, floor_of_scores floor) {
    double total = write_weights(s);
    /* Tokens below it, were they all, would weigh less than what may be left out. */
    float low = (float)log((1.0 - (double)top_p) * total / (double)s->size) - 0.001f;
    if (floor.score > -INFINITY) {
        total = 0;
        low = floor.score;
        int64_t num_kept = collect(s, s->weights, (band){low, INFINITY, 0}, floor);
        for (int64_t i = 0; i < num_kept; i++) total += s->candidates[i].weight;
    }
    return raise_floor(s, s->weights, low, (double)top_p * total, floor);
}

static floor_of_scores keep_min_p(float min_p, floor_of_scores floor) {
    float score = logf(min_p);
    return score > floor.score ? (floor_of_scores){score, INT64_MAX} : floor;
}

/* cllm_core.engine.noise.mix32 */
static uvec mix_words(uvec x) {
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15;
    x *= 0x735a2d97u;
    return x ^ x >> 15;
}

/* Standard Gumbel noise of a hashed word, as cllm_core.engine.noise.gumbel_noise. */
static float gumbel(uint32_t hashed) {
    float uniform = ((float)hashed + 0.5f) * 0x1p-32f;
    return -logf(-log1pf(-(uniform > LARGEST_BELOW_ONE ? LARGEST_BELOW_ONE : uniform)));
}

/* The token of the largest score + noise, the lowest id of equal ones.
 *
 * Noise is -log(-log(1 - u)), and -log(1 - u) >= u: a token can only win if u < e^(score - best sum so far). u costs a
 * hash; the logarithms are taken of the few tokens that pass. */
static int64_t choose(const draw_scratch *s, floor_of_scores floor, uint32_t factor, uint32_t key) {
    float best = -INFINITY;
    int64_t chosen = 0;
    ivec lanes;
    for (int lane = 0; lane < WIDTH; lane++) lanes[lane] = lane;
    for (int64_t block = 0; block < s->num_blocks; block++) {
        if (s->block_max[block] < floor.score || s->block_max[block] + LARGEST_NOISE < best) continue;
        for (int64_t first = block * BLOCK; first < (block + 1) * BLOCK; first += WIDTH) {
            vec scores = load(s->scores + first);
            uvec words = mix_words((uvec)(lanes + (int32_t)(first + 1)));
            uvec hashed = mix_words(words * factor ^ key);
            vec uniform = __builtin_convertvector((ivec)(hashed >> 8), vec) * 0x1p-24f; /* rounded down */
            vec reach = scores - best;
            vec bound = exp_nonpositive(blend(reach > 0.0f, (vec){0}, reach)) * 1.00001f;
            ivec passes = (uniform <= bound) & (scores >= floor.score);
            if (!any_lane(passes)) continue;
            for (int lane = 0; lane < WIDTH; lane++) {
                if (!passes[lane] || !may_choose(scores[lane], first + lane, floor)) continue;
                float sum = scores[lane] + gumbel(hashed[lane]);
                if (sum > best) best = sum, chosen = first + lane;
            }
        }
    }
    return chosen;
}

static int64_t draw_token(const draw_call *call, int64_t row, draw_scratch *s) {
    const float *logits = call->logits + call->positions[row] * call->stride;
    float top = largest(logits, s->size), temperature = call->temperature[row];
    if (!(top > -INFINITY)) return 0; /* nothing may be chosen */
    write_scores(logits, top, temperature < FLT_MIN ? FLT_MIN : temperature, s);
    floor_of_scores floor = {-INFINITY, 0};
    if (call->top_k && call->top_k[row] < s->size) floor = keep_top_k(s, call->top_k[row]);
    if (call->top_p) floor = keep_top_p(s, call->top_p[row], floor);
    if (call->min_p) floor = keep_min_p(call->min_p[row], floor);
    const int64_t *keys = call->keys + 2 * row;
    return choose(s, floor, (uint32_t)(keys[0] >> 1) | 1, (uint32_t)keys[1]);
}

static void draw_rows(member *me, void *argument) {
    const draw_call *call = argument;
    float *memory = call->scratch + me->index * scratch_size(call->vocab_size);
    draw_scratch scratch = scratch_of(memory, call->vocab_size);
    for (int64_t row; (row = next_item(me)) >= 0;) call->out[row] = draw_token(call, row, &scratch);
}

/* Numbers of scratch that a thread needs. */
int64_t EXPORT(draw_scratch_size)(int64_t vocab_size) { return scratch_size(vocab_size); }

typedef struct {
    const float *logits; /* [num_rows, stride] */
    int64_t stride, vocab_size;
    int64_t *out; /* [num_rows] */
} largest_call;

/* The first index of a value; 0 where there is none. */
static int64_t find(const float *x, int64_t size, float value) {
    int64_t i = 0;
    while (i + WIDTH <= size && !any_lane(load(x + i) == value)) i += WIDTH;
    while (i < size && x[i] != value) i++;
    return i < size ? i : 0;
}

static void largest_rows(member *me, void *argument) {
    const largest_call *call = argument;
    for (int64_t row; (row = next_item(me)) >= 0;) {
        const float *logits = call->logits + row * call->stride;
        call->out[row] = find(logits, call->vocab_size, largest(logits, call->vocab_size));
    }
}

/* out: where the largest logit of each row is, the first of equal ones. */
void EXPORT(largest)(const float *logits, int64_t stride, int64_t vocab_size, int64_t num_rows, int num_threads,
                     int64_t *out) {
    largest_call call = {logits, stride, vocab_size, out};
    run_loop(num_threads, num_rows, largest_rows, &call);
}

void EXPORT(draw)(const draw_call *call, int num_threads) {
    run_loop(num_threads, call->num_rows, draw_rows, (void *)call);
}
