"""Memory that this process may use."""

from __future__ import annotations

import contextlib
import ctypes
import math
from pathlib import Path

from extractor.system.cpu import CGROUPS, CGROUPS_OF_PROCESS, control_groups

__all__ = ["free_memory", "granted_memory", "share_memory"]

MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")

_sharers = 1  # processes that share the memory of this machine; see share_memory()
UNLIMITED = 2**60  # version 1 says "no limit" by a number of pages near 2**63


def granted_memory(
    cgroups: Path = CGROUPS, of_process: Path = CGROUPS_OF_PROCESS, meminfo: Path = MEMINFO
) -> tuple[float, float]:
    """Return the total and the free memory in bytes; inf where it is not known.

    Counts what control groups grant, as containers and schedulers set it: ``memory.max`` in
    https://docs.kernel.org/admin-guide/cgroup-v2.html, ``memory.limit_in_bytes`` of version 1.
    Cached files count as free, since they give way.
    """
    total, free = _machine(meminfo)
    for folder, is_version_2 in control_groups("memory", cgroups, of_process):
        limit = _number(folder / ("memory.max" if is_version_2 else "memory.limit_in_bytes"))
        if limit < UNLIMITED:
            name = "memory.current" if is_version_2 else "memory.usage_in_bytes"
            used = _number(folder / name) - _cached(folder / "memory.stat")
            total = min(total, limit)
            free = min(free, limit - used if used < limit else 0)
    return total, free


def free_memory() -> float:
    """Return the bytes that this process may still use; inf where that is not known.

    What the process has freed and keeps for itself counts. ``ulimit -v`` counts, too.
    """
    _, free = granted_memory()
    return min(free / _sharers + _kept_memory(), _free_addresses())


def share_memory(processes: int) -> None:
    """Let this process take no more than its share of the memory that is free.

    Args:
        processes: Number of processes that compute on this machine, this one included.
    """
    global _sharers
    _sharers = processes


def _machine(meminfo: Path) -> tuple[float, float]:
    """Return the total and the available memory of the machine."""
    sizes = _numbers(meminfo)
    total, free = (sizes.get(name, math.inf) for name in ("MemTotal:", "MemAvailable:"))
    return total * 1024, free * 1024


def _cached(stat: Path) -> float:
    """Return the bytes of files that a control group and those below it cache."""
    sizes = _numbers(stat)
    prefix = "total_" if "total_active_file" in sizes else ""  # version 1
    return sum(sizes.get(f"{prefix}{name}", 0) for name in ("active_file", "inactive_file"))


def _numbers(file: Path) -> dict[str, float]:
    """Return the numbers in a file with lines of a name, a number and perhaps a unit."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = [line.split() for line in file.read_text().splitlines()]
        return {line[0]: float(line[1]) for line in words}
    return {}


def _free_addresses() -> float:
    """Return the bytes that ``ulimit -v`` leaves, or inf."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return math.inf
        pages = int(STATM.read_text().split()[0])
        return max(limit - pages * resource.getpagesize(), 0)
    except (ImportError, OSError, ValueError):
        return math.inf


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc: ten numbers, the ninth of which is that of free bytes."""

    _fields_ = (
        ("before", ctypes.c_size_t * 8),
        ("free", ctypes.c_size_t),
        ("top", ctypes.c_size_t),
    )


def _kept_memory() -> int:
    """Return the bytes that were freed and that glibc keeps for later; 0 without glibc."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return 0
    mallinfo.restype = _Mallinfo
    return int(mallinfo().free)


def _number(file: Path) -> float:
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # no such group, or "max", which is no limit
        return math.inf
