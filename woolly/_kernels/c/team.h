/* Threads of one parallel region: stages that they go through together, and tasks handed out one by one.
 *
 * A stage ends when all of its tasks are done, not when all threads have come: one that waits for a core, and so is not
 * inside, holds nobody up, and goes on where the others are when it comes. Who waits long sleeps, so that its core serves
 * a thread of ours that was pushed off, or somebody else. */
#ifndef WOOLLY_TEAM_H
#define WOOLLY_TEAM_H

#include <limits.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#define SPIN_PAUSE() __builtin_ia32_pause()
#else
#define SPIN_PAUSE() ((void)0)
#endif

enum {
    SPINS_A_LOOK = 64,        /* between two looks at the clock */
    SPIN_NS = 50000,          /* longer may mean that a thread lost its core: those that wait offer theirs */
    SLEEP_NS = 5000000,       /* to wake a thread costs 5 us, in a guest 50 or, where the host gave its core away, far more */
};

#define TEAM_CLOSED (UINT64_C(1) << 31)

typedef struct {
    uint64_t state __attribute__((aligned(64))); /* turn << 32 | TEAM_CLOSED | threads inside */
    int32_t turn __attribute__((aligned(64)));   /* once more: what those that wait look at */
    int32_t n_sleepers;
} woolly_team;

static inline int64_t team_clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void team_sleep(woolly_team *team, int32_t turn) {
#if defined(__linux__)
    __atomic_add_fetch(&team->n_sleepers, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&team->turn, __ATOMIC_SEQ_CST) == turn)
        syscall(SYS_futex, &team->turn, FUTEX_WAIT_PRIVATE, turn, NULL, NULL, 0);
    __atomic_sub_fetch(&team->n_sleepers, 1, __ATOMIC_SEQ_CST);
#else
    (void)team, (void)turn;
    sched_yield();
#endif
}

/* Wait until a turn is over; meanwhile memory that is read after it is fetched into this core's L2 */
static inline void team_wait(woolly_team *team, int32_t turn, const uint8_t *ahead, int64_t n_ahead) {
    int64_t since = 0;
    for (int spins = 1; __atomic_load_n(&team->turn, __ATOMIC_ACQUIRE) == turn; spins++) {
        if (n_ahead > 0) {
            __builtin_prefetch(ahead, 0, 2);
            ahead += 64, n_ahead -= 64;
        }
        SPIN_PAUSE();
        if (spins % SPINS_A_LOOK) continue;
        int64_t now = team_clock_ns();
        if (since == 0) since = now;
        if (now - since > SLEEP_NS) team_sleep(team, turn);
        else if (now - since > SPIN_NS) sched_yield();
    }
}

/* Go inside the turn that is on; returns it */
static inline int32_t team_enter(woolly_team *team) {
    uint64_t state = __atomic_load_n(&team->state, __ATOMIC_ACQUIRE);
    for (;;) {
        if (state & TEAM_CLOSED) {
            team_wait(team, (int32_t)(state >> 32), NULL, 0);
            state = __atomic_load_n(&team->state, __ATOMIC_ACQUIRE);
        } else if (__atomic_compare_exchange_n(&team->state, &state, state + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
            return (int32_t)(state >> 32);
        }
    }
}

/* Go out when no task is left. Returns 1 to the last one inside: the turn is over, nobody enters before its team_open, and
 * what it does in between is done by one thread. Otherwise team_wait, then team_enter */
static inline int team_leave(woolly_team *team, int32_t turn) {
    uint64_t empty = (uint64_t)(uint32_t)turn << 32;
    if (__atomic_sub_fetch(&team->state, 1, __ATOMIC_ACQ_REL) != empty) return 0;
    return __atomic_compare_exchange_n(&team->state, &empty, empty | TEAM_CLOSED, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* Begin a turn, with the caller inside */
static inline void team_open(woolly_team *team, int32_t turn) {
    __atomic_store_n(&team->state, (uint64_t)(uint32_t)turn << 32 | 1, __ATOMIC_RELEASE);
    __atomic_store_n(&team->turn, turn, __ATOMIC_SEQ_CST);
#if defined(__linux__)
    if (__atomic_load_n(&team->n_sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &team->turn, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#endif
}

typedef struct {
    int64_t next __attribute__((aligned(64)));
} woolly_tasks;

static inline int64_t next_task(woolly_tasks *tasks) { return __atomic_fetch_add(&tasks->next, 1, __ATOMIC_RELAXED); }

#endif
