"""How much memory this process holds and may still take, and whether a plan fits into it.

Owns /proc/meminfo and the limits of control groups, version 1 and 2. Knows nothing of models: a plan is named parts in
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from woolly.errors import NotEnoughMemoryError
from woolly.terminal import format_bytes

_V1_UNLIMITED = 1 << 60  # version 1 writes "no limit" as a number near 2^63


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that the process can take before the system swaps or kills it.

    The least of what the machine has available and what each control group around the process has left. A group's page
    cache that can be dropped counts as free.

    Parameters
    ----------
    root : Path
        Where proc and sys are; for tests.

    Returns
    -------
    int or None
        None where the system does not tell.
    """
    rooms = [*_machine_room(root), *_cgroup_rooms(root)]
    return max(0, min(rooms)) if rooms else None


def resident_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process holds now; 0 where the system does not tell."""
    for line in _read(root / "proc/self/status").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def check_fits(
    name: str,
    parts: Mapping[str, int],
    *,
    what_fits: Callable[[int], str] | None = None,
    available: int | None = None,
) -> None:
    """Refuse a plan that needs more memory than there is. Allocates nothing.

    Parameters
    ----------
    name : str
        What the plan is for.
    parts : mapping of str to int
        Bytes by what they are for; they are summed.
    what_fits : callable, optional
        From the available bytes to words that say what would fit instead, or to an empty string.
    available : int, optional
        By default `available_bytes()`; nothing is refused where that is unknown.

    Raises
    ------
    NotEnoughMemoryError
        The message gives the bytes needed, part by part, the bytes available, and what would fit.
    """
    available = available_bytes() if available is None else available
    needed = sum(parts.values())
    if available is None or needed <= available:
        return
    each = ", ".join(f"{part} {format_bytes(n_bytes)}" for part, n_bytes in parts.items())
    message = (
        f"{name} needs {format_bytes(needed)} of memory ({each}), {format_bytes(available)} are available "
        f"({needed:,} and {available:,} bytes)"
    )
    words = what_fits(available) if what_fits else ""
    raise NotEnoughMemoryError(f"{message}; what would fit: {words}" if words else message)


def _machine_room(root: Path) -> Iterator[int]:
    """MemAvailable, if the system tells."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """What is left in each control group that the process is in, from its own up to the root."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        # In a container the path may be the host's, which is not there: then only the groups above it count.
        for folder in (group, *group.parents):
            yield from _room(folder, limit, usage, cache)
            if folder == base:
                break


def _room(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    """Limit minus usage of one group; nothing where it has no limit."""
    limit, usage = _read(folder / limit_name).strip(), _read(folder / usage_name).strip()
    if not (limit.isdigit() and usage.isdigit()) or int(limit) >= _V1_UNLIMITED:
        return
    droppable = 0
    for line in _read(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == cache_name:
            droppable = int(value)
    yield int(limit) - int(usage) + droppable


def _read(path: Path) -> str:
    """The text of a file of the kernel's; empty where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
