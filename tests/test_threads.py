"""How many threads there may be, and how many there are by default."""

import os
import subprocess
import sys

import numpy as np
import pytest

from woolly._kernels import check_threads, default_threads, threads
from woolly.errors import WoollyError


def test_default_is_within_the_affinity_mask() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))
    assert check_threads(None) == default_threads()


@pytest.mark.parametrize("n_threads", [1, 2, 256])
def test_threads_in_range_are_taken(n_threads: int) -> None:
    assert check_threads(n_threads) == n_threads


@pytest.mark.parametrize("n_threads", [0, -1, 257, 2**70, 1.0, "2", True, np.float32(2)])
def test_anything_else_is_refused(n_threads: object) -> None:
    with pytest.raises(WoollyError, match=r"^n_threads: expected an integer of 1 to 256, got "):
        check_threads(n_threads)


def test_openmp_limit_lowers_the_default() -> None:
    code = "from woolly._kernels import default_threads; print(default_threads())"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "1"


def test_cpus_without_topology_count_as_cores() -> None:
    assert threads._physical_cores({10**6, 10**6 + 1}) == 2
