"""The machine that figures belong to: processor, caches, memory, versions. Reads Linux's own files; elsewhere less."""

from __future__ import annotations

import contextlib
import datetime
import platform
import resource
import subprocess
import sys
from pathlib import Path

from woolly.bench.harness import Row
from woolly.memory import proc_bytes

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def describe(n_threads: int) -> Row:
    """A row that says what was measured on: machine, instruction set, threads, versions, commit."""
    from woolly.environment import describe as describe_build

    build = describe_build()
    return {
        "mode": "machine",
        "machine": build["machine"],
        "isa": build["isa"],
        "isas": build["isas available"],
        "n_threads": n_threads,
        "n_cpus": build["threads"],
        "woolly": build["woolly"],
        "python": build["python"],
        "numpy": build["numpy"],
        "kernel": platform.release(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "memory_bytes": memory_bytes("MemTotal"),
        "unused_units": unused_units(build["isas available"]),
    }


def commit() -> str | None:
    """The commit of the checkout that runs, None where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parents[2]), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    return None


def caches() -> list[Row]:
    """Sizes of the caches of the first core: level, kind, bytes, and how many CPUs share each."""
    found: list[Row] = []
    for folder in sorted(CACHES.glob("index*")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            kind = (folder / "type").read_text().strip().lower()
            size = (folder / "size").read_text().strip()
            shared = _count_cpus((folder / "shared_cpu_list").read_text().strip())
            level = int((folder / "level").read_text())
            found.append({"level": level, "kind": kind, "bytes": _size(size), "shared_by": shared})
    return found


def last_level_bytes() -> int:
    """Bytes of the largest cache; 32 MB where the system does not tell."""
    return max((cache["bytes"] for cache in caches()), default=32 << 20)


def memory_bytes(field: str = "MemAvailable") -> int:
    """A figure of /proc/meminfo in bytes, 0 where there is none."""
    return proc_bytes("meminfo", field) or 0


def peak_memory_bytes() -> int:
    """The most memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return proc_bytes("self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def unused_units(isas: list[str]) -> list[str]:
    """Matrix units of the processor that no instruction set of this build uses: limits are stated without them."""
    if any("amx" in isa for isa in isas):
        return []
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return sorted(flag for flag in line.split() if flag.startswith("amx_") and flag != "amx_tile")
    return []


def _size(text: str) -> int:
    return int(text[:-1]) * SUFFIXES[text[-1]] if text[-1] in SUFFIXES else int(text)


def _count_cpus(text: str) -> int:
    """CPUs in a list such as 0-3,8."""
    ends = [part.split("-") for part in text.split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
