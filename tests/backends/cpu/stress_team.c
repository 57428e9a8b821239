/* Loops of a team whose items depend on all items of the loop before, run by callers that compete for the helpers. Exits
 * with 1 where an item was run twice, not at all, or too early. */

#include "team.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#define NUM_CALLERS 2
#define MAX_ITEMS 37

static int num_threads, num_loops;

/* A loop reads what the last one has written, as layers do. */
typedef struct {
    int64_t in[MAX_ITEMS], out[MAX_ITEMS];
    int64_t num_in;
} loop_data;

static void add_items(member *me, void *argument) {
    loop_data *data = argument;
    for (int64_t item; (item = next_item(me)) >= 0;) {
        for (volatile int spins = 0; spins < 500; spins++) continue; /* long enough for helpers to come */
        for (int64_t i = 0; i < data->num_in; i++) data->out[item] += data->in[i] + item;
    }
}

static void *call(void *is_wrong) {
    unsigned seed = 1;
    loop_data data = {.in = {1}, .num_in = 1};
    for (int n = 0; n < num_loops;) {
        team *t = begin_team(num_threads);
        for (int end = n + 10; n < end; n++) {
            int64_t num_items = rand_r(&seed) % (MAX_ITEMS + 1), sum = 0;
            for (int64_t i = 0; i < data.num_in; i++) sum += data.in[i];
            for (int64_t i = 0; i < MAX_ITEMS; i++) data.out[i] = 0;
            run_items(t, num_items, add_items, &data);
            for (int64_t i = 0; i < MAX_ITEMS; i++) {
                int64_t expected = i < num_items ? sum + i * data.num_in : 0;
                if (data.out[i] != expected) *(int *)is_wrong = 1;
                data.in[i] = expected % 1000;
            }
            data.num_in = num_items;
        }
        end_team(t);
    }
    return 0;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    num_threads = atoi(arguments[1]);
    num_loops = atoi(arguments[2]);
    pthread_t callers[NUM_CALLERS];
    int is_wrong[NUM_CALLERS] = {0}, some = 0;
    for (int i = 0; i < NUM_CALLERS; i++) pthread_create(&callers[i], 0, call, &is_wrong[i]);
    for (int i = 0; i < NUM_CALLERS; i++) pthread_join(callers[i], 0), some |= is_wrong[i];
    if (some) fprintf(stderr, "items were lost, run twice, or read what was not written yet\n");
    return some;
}
