/* The kernels' own threads. A team of them runs one call as a sequence of loops: the caller's thread goes through the
 * sequence, and helpers take items of the loop it is at. It waits for items that a helper has begun, never for a helper:
 * one that another program keeps from its processor delays nothing but the item in its hands, and the caller is as fast
 * as alone. Helpers offer their processor to other programs between items, as one that is taken away in the middle of an
 * item keeps the caller waiting. Waiting threads spin for some microseconds, then sleep.
 *
 * OpenMP's threads meet at the end of each loop and spin for milliseconds. Beside another program, steps were seen to
 * take a hundred times as long.
 */

#ifndef CLLM_TEAM_H
#define CLLM_TEAM_H

#include <stdint.h>

typedef struct team team;

/* A thread at a loop. */
typedef struct {
    team *team;
    int index, num_threads;
    uint32_t loop;
    int64_t num_items, item; /* item: that it holds, or -1 */
    int is_first;            /* the item was taken before the work began */
    int num_exhausted;       /* shares in which it found no more items */
    int64_t *turn_end;       /* when a helper is to offer its processor to others; null for the caller */
} member;

/* A member's work on a loop: it calls next_item until there is none left, and does not look at the argument then. */
typedef void work_function(member *me, void *argument);

/* A team of up to num_threads threads, the caller's among them; of the caller's alone while another call has the rest. */
team *begin_team(int num_threads);
void end_team(team *t);
int team_size(const team *t);

/* Runs a loop; returns when all items are done, and what was written for them is visible. */
void run_items(team *t, int64_t num_items, work_function *work, void *argument);

/* The next item that nobody has taken yet, or -1; the one before it is done. Items come first from the member's own part
 * of the loop, which is contiguous, then from the others'. */
int64_t next_item(member *me);

/* A call that is one loop. */
static inline void run_loop(int num_threads, int64_t num_items, work_function *work, void *argument) {
    team *t = begin_team(num_threads);
    run_items(t, num_items, work, argument);
    end_team(t);
}

#endif
