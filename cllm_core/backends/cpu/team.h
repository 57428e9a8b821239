/* The kernels' own threads. A team of them runs one call: its members share the work out and wait for each other at
 * barriers, spinning for some microseconds and then asleep.
 *
 * OpenMP's threads spin for milliseconds instead. Where other programs want the processors too, they use up their time
 * with waiting and are descheduled when there is work: steps were seen to take a hundred times as long.
 */

#ifndef CLLM_TEAM_H
#define CLLM_TEAM_H

#include <stdatomic.h>
#include <stdint.h>

typedef struct team team;

/* Items that have been taken of a thread's share of a loop; on a cache line of its own. */
typedef struct {
    _Atomic int64_t taken;
    char padding[56];
} share;

/* One thread of a call. */
typedef struct {
    team *team;
    share *shares; /* [num_threads] */
    int index, num_threads;
    int num_exhausted; /* shares in which it found no more items, since the last barrier */
} member;

/* Runs `work` on up to num_threads threads, the caller's among them, and returns when all have come back. A call that
 * comes while another one has the threads runs on its caller's alone. */
void run_team(int num_threads, void (*work)(member *me, void *argument), void *argument);

/* Returns when all members have called it; what they wrote before is visible to all. */
void team_barrier(member *me);

/* The next item of a loop over num_items that nobody has taken yet, or -1: first of the member's own share, which is
 * contiguous, then of the others', so that a thread without a processor holds nobody up. One such loop between two
 * barriers. */
static inline int64_t next_item(member *me, int64_t num_items) {
    for (; me->num_exhausted < me->num_threads; me->num_exhausted++) {
        int64_t owner = (me->index + me->num_exhausted) % me->num_threads;
        int64_t first = num_items * owner / me->num_threads, end = num_items * (owner + 1) / me->num_threads;
        int64_t item = first + atomic_fetch_add_explicit(&me->shares[owner].taken, 1, memory_order_relaxed);
        if (item < end) return item;
    }
    return -1;
}

/* A member's fixed part of a loop, for what is too short to be shared out anew, or read by the same member next. */
typedef struct {
    int64_t first, end;
} range;

static inline range own_range(const member *me, int64_t num_items) {
    return (range){num_items * me->index / me->num_threads, num_items * (me->index + 1) / me->num_threads};
}

#endif
