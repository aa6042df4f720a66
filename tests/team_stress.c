/* Threads go through turns as those of a program do (executor.pyx), with plain memory that only team.h orders: tasks read
 * what every task of the turn before wrote, and who ends a turn writes alone before the next. Some come late or are held
 * up. Exits with 0 if all sums are right; built with ThreadSanitizer, a race ends it. THREADS TURNS: its arguments. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "team.h"

enum { N_TASKS = 7, MOST_TURNS = 100000, MOST_THREADS = 64 };

static woolly_team team;
static woolly_tasks tasks[MOST_TURNS];
static uint32_t values[2][N_TASKS]; /* of this turn and the one before */
static uint32_t alone;              /* written between turns */
static int n_turns;

static uint32_t task_value(const uint32_t *before, uint32_t other, uint32_t turn, uint32_t task) {
    uint32_t sum = other + turn * 31 + task;
    for (int i = 0; i < N_TASKS; i++) sum = sum * 31 + before[i];
    return sum;
}

static void hold_up(uint32_t seed, int32_t turn) {
    if ((seed * 2654435761u + (uint32_t)turn * 40503u) % 257 == 0) nanosleep(&(struct timespec){0, 100000}, NULL);
}

static void *work(void *argument) {
    uint32_t seed = (uint32_t)(size_t)argument;
    if (seed % 3 == 2) nanosleep(&(struct timespec){0, 2000000}, NULL);
    int32_t turn = team_enter(&team);
    while (turn < n_turns) {
        for (int64_t k; (k = next_task(&tasks[turn])) < N_TASKS; hold_up(seed, turn))
            values[turn % 2][k] = task_value(values[(turn + 1) % 2], alone, (uint32_t)turn, (uint32_t)k);
        if (team_leave(&team, turn)) {
            alone = alone * 7 + values[turn % 2][0];
            team_open(&team, ++turn);
        } else {
            team_wait(&team, turn, NULL, 0);
            turn = team_enter(&team);
        }
    }
    return NULL;
}

int main(int n, char **arguments) {
    int n_threads = n == 3 ? atoi(arguments[1]) : 0;
    n_turns = n == 3 ? atoi(arguments[2]) : 0;
    if (n_threads < 1 || n_threads > MOST_THREADS || n_turns < 1 || n_turns >= MOST_TURNS) return 2;
    pthread_t threads[MOST_THREADS];
    for (int i = 0; i < n_threads; i++) pthread_create(&threads[i], NULL, work, (void *)(size_t)i);
    for (int i = 0; i < n_threads; i++) pthread_join(threads[i], NULL);

    uint32_t expected[2][N_TASKS] = {{0}}, other = 0;
    for (int turn = 0; turn < n_turns; turn++) {
        for (int k = 0; k < N_TASKS; k++)
            expected[turn % 2][k] = task_value(expected[(turn + 1) % 2], other, (uint32_t)turn, (uint32_t)k);
        other = other * 7 + expected[turn % 2][0];
    }
    if (alone == other) return 0;
    fprintf(stderr, "%d threads, %d turns: found %u, expected %u\n", n_threads, n_turns, alone, other);
    return 1;
}
