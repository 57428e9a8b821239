#include "team.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>

#define MAX_THREADS 256
#define BARRIER_SPIN 50000 /* nanoseconds that a member spins at a barrier */
#define IDLE_SPIN 100000   /* and between two calls, which are a few hundred microseconds apart within a step */
#define SPINS_PER_CLOCK 32 /* between two looks at the clock */

/* A counter that threads wait on until it changes. */
typedef struct {
    _Atomic int32_t value, num_sleeping;
    pthread_cond_t changed;
} event;

struct team {
    int num_threads;
    _Atomic int32_t num_arrived;
    event round; /* of the barrier */
    void (*work)(member *me, void *argument);
    void *argument;
    share *shares;
};

static pthread_mutex_t sleepers = PTHREAD_MUTEX_INITIALIZER; /* held by who falls asleep or wakes others */
static pthread_mutex_t caller = PTHREAD_MUTEX_INITIALIZER;   /* held by the call that has the threads */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static share all_shares[MAX_THREADS];
static team all = {.round = {.changed = PTHREAD_COND_INITIALIZER}, .shares = all_shares};
static event calls[MAX_THREADS]; /* of each thread: calls that it has been part of */
static int num_started = 1;      /* threads, the caller counted */

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

static int spin(event *e, int32_t old, int64_t duration) {
    int64_t end = nanoseconds() + duration;
    do {
        for (int i = 0; i < SPINS_PER_CLOCK; i++) {
            if (atomic_load_explicit(&e->value, memory_order_acquire) != old) return 1;
            pause_briefly();
        }
    } while (nanoseconds() < end);
    return 0;
}

/* Returns when the counter is not `old` any more. */
static void wait_for_change(event *e, int32_t old, int64_t spin_duration) {
    if (spin(e, old, spin_duration)) return;
    pthread_mutex_lock(&sleepers);
    atomic_fetch_add(&e->num_sleeping, 1);
    while (atomic_load(&e->value) == old) pthread_cond_wait(&e->changed, &sleepers);
    atomic_fetch_sub(&e->num_sleeping, 1);
    pthread_mutex_unlock(&sleepers);
}

static void advance(event *e) {
    atomic_fetch_add(&e->value, 1);
    if (!atomic_load(&e->num_sleeping)) return;
    pthread_mutex_lock(&sleepers);
    pthread_cond_broadcast(&e->changed);
    pthread_mutex_unlock(&sleepers);
}

void team_barrier(member *me) {
    team *t = me->team;
    me->num_exhausted = 0;
    int32_t round = atomic_load(&t->round.value);
    if (atomic_fetch_add(&t->num_arrived, 1) + 1 < me->num_threads) { /* t may be of the next call from here on */
        wait_for_change(&t->round, round, BARRIER_SPIN);
        return;
    }
    atomic_store(&t->num_arrived, 0);
    for (int i = 0; i < me->num_threads; i++) atomic_store_explicit(&t->shares[i].taken, 0, memory_order_relaxed);
    advance(&t->round);
}

static void work_along(team *t, int index) {
    member me = {t, t->shares, index, t->num_threads, 0};
    t->work(&me, t->argument);
    team_barrier(&me);
}

static void *run_thread(void *index_pointer) {
    int index = (int)(intptr_t)index_pointer;
    for (int32_t done = 0;; done++) {
        wait_for_change(&calls[index], done, IDLE_SPIN);
        work_along(&all, index);
    }
    return 0;
}

/* A forked process has none of the threads. */
static void forget_threads(void) {
    pthread_mutex_init(&sleepers, 0);
    pthread_mutex_init(&caller, 0);
    num_started = 1;
    for (int i = 0; i < MAX_THREADS; i++) atomic_store(&all_shares[i].taken, 0);
    atomic_store(&all.num_arrived, 0);
    atomic_store(&all.round.num_sleeping, 0);
    pthread_cond_init(&all.round.changed, 0);
}

static void watch_forks(void) { pthread_atfork(0, 0, forget_threads); }

/* Starts threads until there are num_threads, or as many as the system allows; they take no signals. */
static void start_threads(int num_threads) {
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    for (; num_started < num_threads; num_started++) {
        event *own = &calls[num_started];
        pthread_t thread;
        atomic_store(&own->value, 0);
        atomic_store(&own->num_sleeping, 0);
        pthread_cond_init(&own->changed, 0);
        if (pthread_create(&thread, 0, run_thread, (void *)(intptr_t)num_started)) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

static void run_alone(void (*work)(member *me, void *argument), void *argument) {
    share own = {0};
    team alone = {.num_threads = 1, .work = work, .argument = argument, .shares = &own};
    work_along(&alone, 0);
}

void run_team(int num_threads, void (*work)(member *me, void *argument), void *argument) {
    pthread_once(&once, watch_forks);
    if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
    if (num_threads < 2 || pthread_mutex_trylock(&caller)) {
        run_alone(work, argument);
        return;
    }
    start_threads(num_threads);
    all.num_threads = num_threads < num_started ? num_threads : num_started;
    all.work = work;
    all.argument = argument;
    for (int i = 1; i < all.num_threads; i++) advance(&calls[i]);
    work_along(&all, 0);
    pthread_mutex_unlock(&caller);
}
