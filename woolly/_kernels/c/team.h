/* Threads of one parallel region: a barrier that spins, and tasks handed out one by one. */
#ifndef WOOLLY_TEAM_H
#define WOOLLY_TEAM_H

#include <sched.h>
#include <stdint.h>

#if defined(__x86_64__) || defined(__i386__)
#define SPIN_PAUSE() __builtin_ia32_pause()
#else
#define SPIN_PAUSE() ((void)0)
#endif

enum { SPINS_BEFORE_YIELD = 4000 }; /* some 50 us: longer means that a thread lost its core */

typedef struct {
    int64_t arrived __attribute__((aligned(64)));
    int64_t generation __attribute__((aligned(64)));
} woolly_team;

/* Wait until all threads have arrived. The last one gets 1 at once, while the others wait for its team_release: what it
 * does in between is done by one thread with no further barrier */
static inline int team_arrive(woolly_team *team, int n_threads) {
    int64_t generation = __atomic_load_n(&team->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == n_threads) return 1;
    for (int spins = 0; __atomic_load_n(&team->generation, __ATOMIC_ACQUIRE) == generation; spins++) {
        SPIN_PAUSE();
        if (spins >= SPINS_BEFORE_YIELD) sched_yield();
    }
    return 0;
}

static inline void team_release(woolly_team *team) {
    __atomic_store_n(&team->arrived, 0, __ATOMIC_RELAXED);
    __atomic_add_fetch(&team->generation, 1, __ATOMIC_RELEASE);
}

static inline void team_barrier(woolly_team *team, int n_threads) {
    if (team_arrive(team, n_threads)) team_release(team);
}

typedef struct {
    int64_t next __attribute__((aligned(64)));
} woolly_tasks;

static inline int64_t next_task(woolly_tasks *tasks) { return __atomic_fetch_add(&tasks->next, 1, __ATOMIC_RELAXED); }

#endif
