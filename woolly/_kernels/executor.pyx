"""Running the stages of a program with a team of threads, until they end or are not wanted any more.

Owns who may run when, the turns between which threads wait for each other, their times, and what ends a run from
outside: Ctrl-C, a `Stop` that was cancelled or whose deadline has passed, a model that was closed. How a stage is
computed is the business of operations.pyx.
"""

import threading

cimport openmp
from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport parallel
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memset

from woolly._kernels.experts cimport woolly_tasks
from woolly._kernels.operations cimport (
    ATTENTION, MATMUL, PLAN, Op, Run, chunk_weights, n_rows, woolly_team, work_stage,
)

from woolly._kernels.threads import forks
from woolly.errors import CancelledError, WoollyError

cdef extern from "team.h" nogil:
    int32_t team_enter(woolly_team *team)
    bint team_leave(woolly_team *team, int32_t turn)
    void team_wait(woolly_team *team, int32_t turn, const uint8_t *ahead, int64_t n_ahead)
    void team_open(woolly_team *team, int32_t turn)

cdef extern from * nogil:
    """
    #include <time.h>
    static double seconds_now(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    }
    """
    double seconds_now()

cdef extern from * nogil:
    """
    /* Flags that one thread raises while another looks */
    static inline int flag_get(const volatile int *flag) { return __atomic_load_n(flag, __ATOMIC_RELAXED); }
    static inline void flag_set(volatile int *flag, int value) { __atomic_store_n(flag, value, __ATOMIC_RELAXED); }
    """
    int flag_get(const volatile int *flag)
    void flag_set(volatile int *flag, int value)

cdef double SIGNAL_INTERVAL_S = 0.03
cdef double LOCK_INTERVAL_S = 0.02  # how often a run that waits for another looks whether it is still wanted

cdef enum:
    MOST_TOKENS_AHEAD = 4      # of a step: with more it takes long enough over each weight

cdef enum:
    GO_ON
    INTERRUPTED                # a signal's handler has raised
    CANCELLED
    OVERDUE
    CLOSED


cdef class Stop:
    """A way to end runs from outside: from any thread, or at a deadline."""

    def reset(self, deadline_s=None):
        """Forget an earlier `cancel`; from now on runs end at deadline_s of `time.monotonic`, if it is given."""
        flag_set(&self._asked, 0)
        self._deadline_s = 0 if deadline_s is None else deadline_s

    def set_deadline(self, deadline_s):
        """Runs end at deadline_s of `time.monotonic`, or at no time if None."""
        self._deadline_s = 0 if deadline_s is None else deadline_s

    def cancel(self):
        """End the run that has this stop, and each one after it until `reset`."""
        flag_set(&self._asked, 1)

    def check(self):
        """Raise CancelledError if it was cancelled, or the deadline has passed."""
        raise_for(CANCELLED if flag_get(&self._asked) else OVERDUE if 0 < self._deadline_s <= seconds_now() else GO_ON)


cdef raise_for(int reason):
    if reason == CANCELLED:
        raise CancelledError("the step was cancelled")
    if reason == OVERDUE:
        raise CancelledError("the step was ended at its deadline")
    if reason == CLOSED:
        raise WoollyError("the model was closed")


cdef class Executor:
    """Runs for one program: one at a time, as its buffers are used by each."""

    def __cinit__(self):
        self._lock = threading.Lock()
        self._n_forks = forks()

    cdef enter(self, Stop stop):
        """Wait for the run before this one; give up as soon as this one is not wanted any more."""
        if self._n_forks != forks():
            # A child of fork: the thread that may have held the lock is not here.
            self._lock, self._n_forks = threading.Lock(), forks()
        if stop is not None:
            stop.check()
        while not self._lock.acquire(timeout=LOCK_INTERVAL_S):
            if stop is not None:
                stop.check()
            raise_for(CLOSED if flag_get(&self._closed) else GO_ON)
        if flag_get(&self._closed):
            self._lock.release()
            raise_for(CLOSED)

    cdef leave(self):
        self._lock.release()

    cdef close(self):
        """Refuse further runs, and end the one that runs."""
        flag_set(&self._closed, 1)

    cdef execute(self, Run *run, int n_threads, Stop stop):
        """Run all stages; raises what ended them from outside."""
        memset(run.tasks, 0, 2 * run.n_stages * sizeof(woolly_tasks))
        run.checked_s = run.before_s = seconds_now()
        if stop is not None:
            run.asked, run.deadline_s = &stop._asked, stop._deadline_s
        self._reason = GO_ON
        self._interrupt = None
        with nogil:
            if n_threads == 1:
                self._work(run, 0, 1)
            else:
                with parallel(num_threads=n_threads):
                    self._work(run, openmp.omp_get_thread_num(), openmp.omp_get_num_threads())
        if self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            raise interrupt
        raise_for(self._reason)

    cdef void _work(self, Run *run, int thread, int n_threads) noexcept nogil:
        """What one thread does: its share of each turn, then wait until the turn is over.

        A stage is a turn, or two where its results are merged. One of a single token is no work to share, nor is a
        plan: the thread that ends the turn before it does it, with no waiting.
        """
        cdef float *scratch = run.scratch + thread * run.scratch_floats
        cdef const uint8_t *ahead = NULL
        cdef int64_t n_ahead
        cdef int32_t turn = team_enter(&run.team)
        while turn < 2 * run.n_stages:
            work_stage(run, turn, scratch, n_threads)
            if thread == 0:
                self._look_for_reasons(run)
            if team_leave(&run.team, turn):
                turn = self._next_turn(run, turn, scratch)
                team_open(&run.team, turn)
            else:
                n_ahead = weights_ahead(run, turn // 2, thread, n_threads, &ahead)
                team_wait(&run.team, turn, ahead, n_ahead)
                turn = team_enter(&run.team)

    cdef int32_t _next_turn(self, Run *run, int32_t turn, float *scratch) noexcept nogil:
        """The next turn with work to share, once what comes before it is done; one past the last to end the run."""
        cdef int s = turn // 2
        if turn % 2 == 0 and run.split and run.ops[run.stages[s].begin].kind == ATTENTION:
            return turn + 1
        keep_time(run, s)
        s += 1
        while s < run.n_stages and not self._reason and is_serial(run, s):
            work_stage(run, 2 * s, scratch, 1)
            keep_time(run, s)
            s += 1
        return 2 * (run.n_stages if self._reason else s)

    cdef void _look_for_reasons(self, Run *run) noexcept nogil:
        """Whether to stop after this stage; Ctrl-C is looked for every 30 ms, as that needs the GIL."""
        cdef double now = seconds_now()
        if flag_get(&self._closed):
            self._reason = CLOSED
        elif run.asked != NULL and flag_get(run.asked):
            self._reason = CANCELLED
        elif 0 < run.deadline_s <= now:
            self._reason = OVERDUE
        elif now - run.checked_s > SIGNAL_INTERVAL_S:
            run.checked_s = now
            if self._signalled():
                self._reason = INTERRUPTED

    cdef bint _signalled(self) noexcept with gil:
        try:
            PyErr_CheckSignals()
        except BaseException as interrupt:
            self._interrupt = interrupt
            return True
        return False


cdef bint is_serial(const Run *run, int s) noexcept nogil:
    cdef const Op *op = &run.ops[run.stages[s].begin]
    return op.kind == PLAN or op.kind < MATMUL and n_rows(run, op) <= max(<int64_t>1, op.pairs)


cdef int64_t weights_ahead(const Run *run, int s, int thread, int n_threads, const uint8_t **weights) noexcept nogil:
    """What a thread that waits is going to read next, where weights are all that a step reads: bytes, 0 for none.

    Chunk 0 of the next matmul is the business of the thread that begins its turn.
    """
    if run.n_tokens > MOST_TOKENS_AHEAD:
        return 0
    for s in range(s + 1, run.n_stages):
        if run.ops[run.stages[s].begin].kind == MATMUL:
            return chunk_weights(&run.ops[run.stages[s].begin], 1 + thread % (n_threads - 1), n_threads, weights)
        if not is_serial(run, s):
            break
    return 0


cdef void keep_time(Run *run, int s) noexcept nogil:
    cdef double now
    if run.times != NULL:
        now = seconds_now()
        run.times[s] += now - run.before_s
        run.before_s = now
