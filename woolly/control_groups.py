"""The control groups around this process, versions 1 and 2: folders of files in which the system says what it may use.

Owns where they are. Knows nothing of processors and memory, whose limits stand in them.
"""

from __future__ import annotations

from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> list[tuple[int, Path]]:
    """Each group that limits what a controller counts: the process's own, and all that are around it.

    Parameters
    ----------
    controller : str
        Such as "cpu" or "memory".
    root : Path
        Where proc and sys are; for tests.

    Returns
    -------
    list of (version, folder)
        Folders need not be there: in a container, the path of the process's group may be the host's. So each version's
        root is always among them, as which a container sees its own group.
    """
    bases = {2: root / "sys/fs/cgroup", 1: root / "sys/fs/cgroup" / controller}
    groups = list(bases.items())
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version, own = 1 if controllers else 2, Path(path.lstrip("/"))
        groups += [(version, bases[version] / group) for group in (own, *own.parents) if group != Path()]
    return groups


def read(path: Path) -> str:
    """The text of a file of the system's; empty where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
