"""How many threads to use. This module and the parallel regions of the kernels are all that knows of OpenMP."""

import os

from openmp cimport omp_get_max_threads

from woolly.errors import WoollyError

MAX_THREADS = 256


def _cgroup_cpus():
    """The CPU quota of the process's cgroup in cores, or None."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = f.read().split()
        return None if quota == "max" else max(1, int(int(quota) / int(period)))
    except (OSError, ValueError):
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
    quota = _cgroup_cpus()
    if quota:
        n = min(n, quota)
    if os.environ.get("OMP_NUM_THREADS"):
        n = min(n, omp_get_max_threads())
    return max(1, min(n, MAX_THREADS))


def check_threads(n_threads, /):
    """A valid thread count, from None (the default) or an integer of 1 to 256.

    Raises
    ------
    WoollyError
        It is out of range or no integer.
    """
    if n_threads is None:
        return default_threads()
    if isinstance(n_threads, bool) or not isinstance(n_threads, int) or not 1 <= n_threads <= MAX_THREADS:
        raise WoollyError(f"n_threads: expected an integer of 1 to {MAX_THREADS}, got {n_threads!r}")
    return n_threads
