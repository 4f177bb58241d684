"""Memory that this process may use."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path, PurePosixPath

__all__ = ["granted_memory"]

CGROUPS = Path("/sys/fs/cgroup")
CGROUPS_OF_PROCESS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
UNLIMITED = 2**60  # version 1 says "no limit" by a number of pages near 2**63


def granted_memory(
    cgroups: Path = CGROUPS, of_process: Path = CGROUPS_OF_PROCESS, meminfo: Path = MEMINFO
) -> tuple[float, float]:
    """Return the total and the free memory in bytes; inf where it is not known.

    Counts what control groups grant, as containers and schedulers set it: ``memory.max`` in
    https://docs.kernel.org/admin-guide/cgroup-v2.html, ``memory.limit_in_bytes`` of version 1.
    """
    total, free = _machine(meminfo)
    with contextlib.suppress(OSError, ValueError):
        for line in of_process.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            group = PurePosixPath(name.lstrip("/"))
            for ancestor in (group, *group.parents):  # see extractor.system.cpu
                if not controllers:
                    folder, files = cgroups / ancestor, ("memory.max", "memory.current")
                elif "memory" in controllers.split(","):
                    folder = cgroups / "memory" / ancestor
                    files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                else:
                    continue
                limit = _number(folder / files[0])
                if limit < UNLIMITED:
                    used = _number(folder / files[1])
                    total = min(total, limit)
                    free = min(free, limit - used if used < limit else 0)
    return total, free


def _machine(meminfo: Path) -> tuple[float, float]:
    """Return the total and the available memory of the machine."""
    sizes: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                sizes[name] = int(value.split()[0]) * 1024
    return sizes.get("MemTotal", math.inf), sizes.get("MemAvailable", math.inf)


def _number(file: Path) -> float:
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # no such group, or "max", which is no limit
        return math.inf
