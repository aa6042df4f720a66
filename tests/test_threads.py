"""How many threads there may be, and how many there are by default."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from woolly._kernels import check_threads, default_threads, limits, threads
from woolly._kernels.spinning import SPINS, bounded_spinning
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


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"sys/fs/cgroup/cpu.max": "350000 100000"}, 3),
        ({"sys/fs/cgroup/cpu.max": "20000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "nonsense"}, None),
        (
            {
                "proc/self/cgroup": "0::/user/job",
                "sys/fs/cgroup/user/job/cpu.max": "max 100000",
                "sys/fs/cgroup/user/cpu.max": "200000 100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/docker/abc",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3,
        ),
    ],
)
def test_the_least_quota_of_all_control_groups(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota_cores(tmp_path) == cores


def test_quota_lowers_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "quota_cores", lambda: 1)
    assert default_threads() == 1


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_spinning_is_bounded_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    with bounded_spinning():
        assert os.environ.get("GOMP_SPINCOUNT") == (chosen.get("GOMP_SPINCOUNT") if chosen else SPINS)
    assert os.environ.get("GOMP_SPINCOUNT") == chosen.get("GOMP_SPINCOUNT")


@pytest.mark.parametrize("n_threads", [1, 2, 5, 16])
def test_a_team_goes_through_its_stages_also_with_more_threads_than_cores(n_threads: int) -> None:
    limits.run_barriers(2000, n_threads=n_threads)


def test_cpus_without_topology_count_as_cores() -> None:
    assert threads._physical_cores({10**6, 10**6 + 1}) == 2
