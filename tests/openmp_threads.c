/* What the extensions take of OpenMP's runtime, on plain threads: for ThreadSanitizer, which does not see how gcc's own
 * runtime starts threads and waits for them, and so reports races that are none.
 *
 * A region starts its threads and joins them; tasks of a loop are handed out by a relaxed counter, so that nothing but
 * the program's own synchronisation orders what its threads do in between. Loaded before the real one (LD_PRELOAD). */
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

enum { MOST_LOOPS = 16, MOST_THREADS = 256 };

typedef struct {
    void (*body)(void *);
    void *data;
    int n_threads;
    pthread_barrier_t barrier;
    long next[MOST_LOOPS]; /* of the region's n-th loop: chunks handed out */
} region_t;

typedef struct {
    region_t *region;
    int thread, n_loops;
    long start, end, step; /* of the loop that the thread is in; step: increment times chunk */
} place_t;

static __thread place_t here;

static void run(region_t *region, int thread) {
    place_t outer = here;
    here = (place_t){.region = region, .thread = thread};
    region->body(region->data);
    here = outer;
}

typedef struct { region_t *region; int thread; } start_t;

static void *begin(void *argument) {
    start_t *start = argument;
    run(start->region, start->thread);
    return NULL;
}

int omp_get_thread_num(void) { return here.thread; }
int omp_get_num_threads(void) { return here.region ? here.region->n_threads : 1; }
int omp_get_max_threads(void) {
    const char *chosen = getenv("OMP_NUM_THREADS");
    return chosen ? atoi(chosen) : (int)sysconf(_SC_NPROCESSORS_ONLN);
}

void GOMP_parallel(void (*body)(void *), void *data, unsigned n_threads, unsigned flags) {
    (void)flags;
    region_t region = {.body = body, .data = data, .n_threads = n_threads ? (int)n_threads : omp_get_max_threads()};
    pthread_t threads[MOST_THREADS];
    start_t starts[MOST_THREADS];
    pthread_barrier_init(&region.barrier, NULL, (unsigned)region.n_threads);
    for (int i = 1; i < region.n_threads; i++) {
        starts[i] = (start_t){&region, i};
        if (pthread_create(&threads[i], NULL, begin, &starts[i])) abort();
    }
    run(&region, 0);
    for (int i = 1; i < region.n_threads; i++) pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&region.barrier);
}

void GOMP_barrier(void) {
    if (here.region) pthread_barrier_wait(&here.region->barrier);
}

_Bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *last) {
    if (!here.region) return 0;
    long k = __atomic_fetch_add(&here.region->next[here.n_loops - 1], 1, __ATOMIC_RELAXED);
    if (k > (here.end - here.start) / here.step) return 0; /* before the product, which might wrap */
    *first = here.start + k * here.step;
    *last = *first + here.step < here.end ? *first + here.step : here.end;
    return *first < here.end;
}

_Bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long increment, long chunk, long *first, long *last) {
    if (here.n_loops == MOST_LOOPS) abort();
    here.n_loops++;
    here.start = start, here.end = end, here.step = increment * chunk;
    return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end_nowait(void) {}
