/* Where the threads of a parallel region wait for each other: by turning for some microseconds, then asleep.
 *
 * OpenMP's barriers turn for milliseconds. Where other programs want the processors too, threads then use up their time
 * with waiting and are set aside when there is work: steps were seen to take a hundred times as long.
 */

#ifndef CLLM_BARRIER_H
#define CLLM_BARRIER_H

#include <limits.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define TURNS 2000 /* some 50 microseconds */

typedef struct {
    _Atomic int32_t arrived, round, sleeping;
    int32_t num_threads;
} barrier;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Sleeps while `round` is the current one. */
static inline void sleep_through(barrier *b, int32_t round) {
#ifdef __linux__
    atomic_fetch_add(&b->sleeping, 1);
    while (atomic_load(&b->round) == round)
        syscall(SYS_futex, &b->round, FUTEX_WAIT_PRIVATE, round, (void *)0, (void *)0, 0);
    atomic_fetch_sub(&b->sleeping, 1);
#else
    while (atomic_load(&b->round) == round) sched_yield();
#endif
}

/* Returns when all threads have called it. */
static inline void meet(barrier *b) {
    int32_t round = atomic_load(&b->round);
    if (atomic_fetch_add(&b->arrived, 1) + 1 == b->num_threads) {
        atomic_store(&b->arrived, 0);
        atomic_store(&b->round, round + 1);
#ifdef __linux__
        if (atomic_load(&b->sleeping)) syscall(SYS_futex, &b->round, FUTEX_WAKE_PRIVATE, INT_MAX, (void *)0, (void *)0, 0);
#endif
        return;
    }
    for (int turn = 0; turn < TURNS; turn++) {
        if (atomic_load(&b->round) != round) return;
        pause_briefly();
    }
    sleep_through(b, round);
}

#endif
