#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#define MAX_THREADS 256
#define MAX_SPIN 100000    /* nanoseconds that a thread spins before it sleeps, at most and at least: half as long each */
#define MIN_SPIN 1000      /* time that it was in vain, as it is for a thread on the same processor; else twice */
#define SPINS_PER_CLOCK 16 /* between two looks at the clock */
#define TURN 1000000       /* nanoseconds between two times that a helper offers its processor to others */

/* A counter that threads wait on. */
typedef struct {
    _Atomic uint32_t value, num_sleeping;
    pthread_cond_t changed;
} event;

/* A thread's part of a loop, on a cache line of its own: number of the loop << 32 | items that nobody has taken. Numbers
 * repeat after 2^32 loops, which take days; no helper is between two instructions for that long. */
typedef struct {
    _Atomic uint64_t left;
    char padding[56];
} share;

/* The description of a loop may be read by a late helper while it is written for the next one. It counts only if the
 * helper then takes an item of the loop it read the number of: there were items left all the time, so that the caller
 * was still at that loop. */
struct team {
    _Atomic int num_threads;
    _Atomic(work_function *) work;
    _Atomic(void *) argument;
    _Atomic int64_t num_items;
    event published; /* loops so far */
    event done;      /* items of this loop */
    int64_t spin_duration; /* of the caller */
    share shares[MAX_THREADS];
};

static pthread_mutex_t sleepers = PTHREAD_MUTEX_INITIALIZER; /* held by who falls asleep or wakes others */
static pthread_mutex_t caller = PTHREAD_MUTEX_INITIALIZER;   /* held by the call that has the helpers */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static team all = {.published = {.changed = PTHREAD_COND_INITIALIZER},
                   .done = {.changed = PTHREAD_COND_INITIALIZER},
                   .spin_duration = MAX_SPIN};
static team alone; /* of any caller: nothing of it is used */
static int num_started = 1; /* threads, the caller's counted */

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int is_over(event *e, uint32_t value, int is_wanted) {
    return (atomic_load(&e->value) == value) == is_wanted;
}

static int spin(event *e, uint32_t value, int is_wanted, int64_t duration) {
    int64_t end = 0;
    for (int spins = 1;; spins++) {
        if (is_over(e, value, is_wanted)) return 1;
        pause_briefly();
        if (spins % SPINS_PER_CLOCK) continue;
        if (!end) end = nanoseconds() + duration;
        if (nanoseconds() >= end) return 0;
    }
}

/* Returns when the value is the given one, or if it is not wanted, another one. */
static void wait_for(event *e, uint32_t value, int is_wanted, int64_t *spin_duration) {
    if (spin(e, value, is_wanted, *spin_duration)) {
        if (*spin_duration < MAX_SPIN) *spin_duration *= 2;
        return;
    }
    if (*spin_duration > MIN_SPIN) *spin_duration /= 2;
    pthread_mutex_lock(&sleepers);
    atomic_fetch_add(&e->num_sleeping, 1);
    while (!is_over(e, value, is_wanted)) pthread_cond_wait(&e->changed, &sleepers);
    atomic_fetch_sub(&e->num_sleeping, 1);
    pthread_mutex_unlock(&sleepers);
}

static void wake(event *e) {
    if (!atomic_load(&e->num_sleeping)) return;
    pthread_mutex_lock(&sleepers);
    pthread_cond_broadcast(&e->changed);
    pthread_mutex_unlock(&sleepers);
}

static inline int64_t part_end(int64_t num_items, int64_t owner, int64_t num_threads) {
    return num_items * (owner + 1) / num_threads;
}

/* An item of the member's loop that is its own now, or -1. */
static int64_t take_item(member *me) {
    for (; me->num_exhausted < me->num_threads; me->num_exhausted++) {
        int owner = (me->index + me->num_exhausted) % me->num_threads;
        _Atomic uint64_t *left = &me->team->shares[owner].left;
        uint64_t word = atomic_load_explicit(left, memory_order_acquire);
        while (word >> 32 == me->loop && (uint32_t)word)
            if (atomic_compare_exchange_weak(left, &word, word - 1))
                return part_end(me->num_items, owner, me->num_threads) - (uint32_t)word;
    }
    return -1;
}

/* Between two items: another program gets the processor now rather than in the middle of an item, for which the caller
 * would have to wait. */
static void yield_in_turns(int64_t *turn_end) {
    int64_t now = nanoseconds();
    if (now < *turn_end) return;
    sched_yield();
    *turn_end = nanoseconds() + TURN;
}

int64_t next_item(member *me) {
    if (me->team == &alone) return me->item + 1 < me->num_items ? ++me->item : -1;
    if (me->is_first) {
        me->is_first = 0;
        return me->item;
    }
    event *done = &me->team->done;
    if (me->item >= 0 && atomic_fetch_add(&done->value, 1) + 1 == (uint32_t)me->num_items) wake(done);
    if (me->turn_end) yield_in_turns(me->turn_end);
    return me->item = take_item(me);
}

/* Takes part in the loop that is published, if it is still there; returns its number. */
static uint32_t help(team *t, int index, int64_t *turn_end) {
    uint32_t loop = atomic_load(&t->published.value);
    member me = {.team = t, .index = index, .loop = loop, .is_first = 1, .turn_end = turn_end};
    work_function *work = atomic_load(&t->work);
    void *argument = atomic_load(&t->argument);
    me.num_items = atomic_load(&t->num_items);
    me.num_threads = atomic_load(&t->num_threads);
    if (index < me.num_threads && (me.item = take_item(&me)) >= 0) work(&me, argument);
    return loop;
}

static void *run_helper(void *index_pointer) {
    int index = (int)(intptr_t)index_pointer;
    int64_t spin_duration = MAX_SPIN, turn_end = 0;
    for (uint32_t last = 0;; wait_for(&all.published, last, 0, &spin_duration)) last = help(&all, index, &turn_end);
    return 0;
}

static void publish(team *t, int64_t num_items, work_function *work, void *argument) {
    uint32_t loop = atomic_load_explicit(&t->published.value, memory_order_relaxed) + 1;
    int num_threads = atomic_load_explicit(&t->num_threads, memory_order_relaxed);
    atomic_store_explicit(&t->work, work, memory_order_relaxed);
    atomic_store_explicit(&t->argument, argument, memory_order_relaxed);
    atomic_store_explicit(&t->num_items, num_items, memory_order_relaxed);
    atomic_store_explicit(&t->done.value, 0, memory_order_relaxed);
    for (int i = 0; i < num_threads; i++) {
        uint64_t count = (uint64_t)(part_end(num_items, i, num_threads) - part_end(num_items, i - 1, num_threads));
        atomic_store_explicit(&t->shares[i].left, (uint64_t)loop << 32 | count, memory_order_release);
    }
    atomic_store(&t->published.value, loop);
    wake(&t->published);
}

void run_items(team *t, int64_t num_items, work_function *work, void *argument) {
    if (num_items < 1) return;
    if (t == &alone || num_items == 1) {
        member me = {.team = &alone, .num_threads = 1, .num_items = num_items, .item = -1};
        work(&me, argument);
        return;
    }
    publish(t, num_items, work, argument);
    member me = {.team = t, .num_threads = t->num_threads, .loop = t->published.value, .num_items = num_items, .item = -1};
    work(&me, argument);
    wait_for(&t->done, (uint32_t)num_items, 1, &t->spin_duration);
}

/* A forked process has none of the threads, and nobody to wait for the items of a loop that was running. */
static void forget_threads(void) {
    pthread_mutex_init(&sleepers, 0);
    pthread_mutex_init(&caller, 0);
    num_started = 1;
    for (int i = 0; i < MAX_THREADS; i++) atomic_store(&all.shares[i].left, 0);
    event *events[] = {&all.published, &all.done};
    for (int i = 0; i < 2; i++) {
        atomic_store(&events[i]->num_sleeping, 0);
        pthread_cond_init(&events[i]->changed, 0);
    }
}

static void watch_forks(void) { pthread_atfork(0, 0, forget_threads); }

/* Starts threads until there are num_threads, or as many as the system allows; they take no signals. */
static void start_threads(int num_threads) {
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    for (; num_started < num_threads; num_started++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, run_helper, (void *)(intptr_t)num_started)) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

team *begin_team(int num_threads) {
    pthread_once(&once, watch_forks);
    if (num_threads < 2 || pthread_mutex_trylock(&caller)) return &alone;
    if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
    if (num_threads > num_started) start_threads(num_threads);
    atomic_store(&all.num_threads, num_threads < num_started ? num_threads : num_started);
    return &all;
}

void end_team(team *t) {
    if (t == &all) pthread_mutex_unlock(&caller);
}

int team_size(const team *t) { return t == &all ? t->num_threads : 1; }
