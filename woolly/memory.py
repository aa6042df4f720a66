"""How much memory this process holds and may still take, and whether a plan fits into it.

Owns what /proc and the control groups say of memory. Knows nothing of models: a plan is named parts in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from woolly.control_groups import control_groups, read
from woolly.errors import NotEnoughMemoryError
from woolly.terminal import format_bytes

_V1_UNLIMITED = 1 << 60  # version 1 writes "no limit" as a number near 2^63
# Of a group, by its version: its limit, what it uses, and the line of memory.stat that says what of this can be dropped
_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


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
    rooms = [_group_room(version, folder) for version, folder in control_groups("memory", root)]
    known = [room for room in (proc_bytes("meminfo", "MemAvailable", root), *rooms) if room is not None]
    return max(0, min(known)) if known else None


def resident_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process holds now; 0 where the system does not tell."""
    return proc_bytes("self/status", "VmRSS", root) or 0


def proc_bytes(file: str, field: str, root: Path = Path("/")) -> int | None:
    """A field of a file in /proc that counts kB, such as "VmHWM" of "self/status", in bytes.

    Returns
    -------
    int or None
        None where the system does not tell.
    """
    for line in read(root / "proc" / file).splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


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


def _group_room(version: int, folder: Path) -> int | None:
    """Limit minus usage of a control group; None where it has no limit."""
    limit_name, usage_name, cache_name = _GROUP_FILES[version]
    limit, usage = read(folder / limit_name).strip(), read(folder / usage_name).strip()
    if not (limit.isdigit() and usage.isdigit()) or int(limit) >= _V1_UNLIMITED:
        return None
    droppable = 0
    for line in read(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == cache_name:
            droppable = int(value)
    return int(limit) - int(usage) + droppable
