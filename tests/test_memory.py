"""What the system says of its memory, from fake files, and plans that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from woolly import memory
from woolly.errors import NotEnoughMemoryError

GB = 10**9
UNLIMITED_V1 = "9223372036854771712"


def make_system(root: Path, files: dict[str, str]) -> Path:
    """A root folder with these files; MemAvailable is 8,000,000 kB."""
    for name, text in {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable:    8000000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_machine_without_limits(tmp_path):
    assert memory.available_bytes(make_system(tmp_path, {})) == 8_000_000 * 1024


def test_system_that_does_not_tell(tmp_path):
    assert memory.available_bytes(tmp_path) is None


def test_cgroup_v2_limit_counts_and_droppable_cache_is_free(tmp_path):
    group = "sys/fs/cgroup/user/app/"
    files = {
        "proc/self/cgroup": "0::/user/app\n",
        group + "memory.max": "4000000000\n",
        group + "memory.current": "3000000000\n",
        group + "memory.stat": "anon 1\ninactive_file 500000000\n",
    }
    assert memory.available_bytes(make_system(tmp_path, files)) == 1_500_000_000


def test_cgroup_v2_parent_may_be_the_tightest(tmp_path):
    files = {
        "proc/self/cgroup": "0::/user/app\n",
        "sys/fs/cgroup/user/app/memory.max": "max\n",
        "sys/fs/cgroup/user/app/memory.current": "10\n",
        "sys/fs/cgroup/user/memory.max": "2000000000\n",
        "sys/fs/cgroup/user/memory.current": "1900000000\n",
    }
    assert memory.available_bytes(make_system(tmp_path, files)) == 100_000_000


def test_cgroup_v1_limit_counts(tmp_path):
    group = "sys/fs/cgroup/memory/docker/abc/"
    files = {
        "proc/self/cgroup": "9:cpu:/\n4:memory:/docker/abc\n0::/\n",
        group + "memory.limit_in_bytes": "3000000000",
        group + "memory.usage_in_bytes": "1000000000",
        group + "memory.stat": "inactive_file 1\ntotal_inactive_file 7\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000000000",
    }
    assert memory.available_bytes(make_system(tmp_path, files)) == 2_000_000_007


def test_container_that_sees_its_own_group_as_the_root(tmp_path):
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n",  # the host's path, which is not mounted here
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000000",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000000",
    }
    assert memory.available_bytes(make_system(tmp_path, files)) == 0


def test_fields_of_proc_are_read(tmp_path):
    root = make_system(tmp_path, {"proc/self/status": "VmHWM:\t    70 kB\nVmRSS:\t    60 kB\n"})
    assert memory.proc_bytes("self/status", "VmHWM", root) == 70 * 1024
    assert memory.resident_bytes(root) == 60 * 1024
    assert memory.proc_bytes("meminfo", "MemTotal", root) == 16_000_000 * 1024
    assert memory.proc_bytes("meminfo", "MemTota", root) is None
    assert memory.resident_bytes(tmp_path / "nowhere") == 0


def test_this_machine_has_memory():
    available = memory.available_bytes()
    assert available is None or available > 1 << 20


def test_plan_that_fits_passes():
    memory.check_fits("small", {"weights": 60, "KV cache": 40}, available=100)


def test_plan_is_not_refused_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    memory.check_fits("huge", {"weights": 10**18})


def test_refusal_gives_needed_available_and_what_would_fit():
    message = (
        r"^big needs 30\.0 GB of memory \(weights 28\.0 GB, KV cache 2\.00 GB\), 20\.0 GB are available "
        r"\(30,000,000,000 and 20,000,000,000 bytes\); what would fit: half of it$"
    )
    with pytest.raises(NotEnoughMemoryError, match=message):
        memory.check_fits(
            "big", {"weights": 28 * GB, "KV cache": 2 * GB}, what_fits=lambda available: "half of it", available=20 * GB
        )
    with pytest.raises(NotEnoughMemoryError, match=r"bytes\)$"):
        memory.check_fits("big", {"weights": 2}, what_fits=lambda available: "", available=1)
