"""How many threads to use. This module and the parallel regions of the kernels are all that knows of OpenMP."""

import os
import warnings
from pathlib import Path

from openmp cimport omp_get_max_threads

from woolly.control_groups import control_groups, read
from woolly.errors import WoollyError

MAX_THREADS = 256

_n_forks = 0           # how many times this process is a child's child of the one that imported us
_has_pool = False      # whether a parallel region may have run: OpenMP keeps its threads, and a fork does not copy them
_lost_pool = False
_lost_pool_told = False

FORK_WARNING = (
    "this process was forked after its parent had run kernels on several threads: it computes on one thread. "
    "Start processes with multiprocessing's spawn or forkserver, or load the model after the fork"
)


def _after_fork():
    global _n_forks, _lost_pool
    _n_forks += 1
    _lost_pool = _has_pool


os.register_at_fork(after_in_child=_after_fork)


def forks():
    """How often this process was forked off since the import; differs from what it was only in a child."""
    return _n_forks


def usable_threads(int n_threads, /):
    """n_threads, but 1 in a child of fork whose parent had started threads: OpenMP would wait for them for ever.

    The first time that it is so, a RuntimeWarning says it.
    """
    global _has_pool, _lost_pool_told
    if n_threads > 1 and _lost_pool:
        if not _lost_pool_told:
            _lost_pool_told = True
            warnings.warn(FORK_WARNING, RuntimeWarning, stacklevel=2)
        return 1
    _has_pool = _has_pool or n_threads > 1
    return n_threads


def quota_cores(root="/"):
    """The least CPU quota of the control groups that the process is in, versions 1 and 2, in whole cores of at least 1.

    Parameters
    ----------
    root : path
        Where proc and sys are; for tests.

    Returns
    -------
    int or None
        None where there is no quota.
    """
    quotas = [_quota(version, group) for version, group in control_groups("cpu", Path(root))]
    cores = [quota for quota in quotas if quota is not None]
    return max(1, int(min(cores))) if cores else None


def _quota(version, group):
    """Cores that a control group may use, None where there is no limit."""
    names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    try:
        quota, period = " ".join(read(group / name) for name in names).split()
        return int(quota) / int(period) if int(quota) > 0 else None  # version 1 says -1
    except ValueError:  # not there, or "max"
        return None


def _physical_cores(cpus):
    """How many physical cores a set of logical CPUs covers; its size where the system does not tell."""
    try:
        cores = set()
        for cpu in cpus:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as f:
                cores.add(f.read().strip())
        return len(cores)
    except OSError:
        return len(cpus)


def default_threads():
    """The smallest of: physical cores in the affinity mask, the cgroup's quota, OMP_NUM_THREADS where it is set.

    Returns
    -------
    int
    """
    if hasattr(os, "sched_getaffinity"):
        n = _physical_cores(os.sched_getaffinity(0))
    else:
        n = os.cpu_count() or 1
    quota = quota_cores()
    if quota:
        n = min(n, quota)
    if os.environ.get("OMP_NUM_THREADS"):
        n = min(n, omp_get_max_threads())
    return max(1, min(n, MAX_THREADS))


def check_threads(n_threads, /):
    """A valid thread count, from None (the default) or an integer of 1 to 256; see `usable_threads` for forks.

    Raises
    ------
    WoollyError
        It is out of range or no integer.
    """
    if n_threads is None:
        n_threads = default_threads()
    if isinstance(n_threads, bool) or not isinstance(n_threads, int) or not 1 <= n_threads <= MAX_THREADS:
        raise WoollyError(f"n_threads: expected an integer of 1 to {MAX_THREADS}, got {n_threads!r}")
    return usable_threads(n_threads)
