"""Cores, threads and vector instructions of the CPU. Imports torch only when it is needed."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

__all__ = [
    "CGROUPS",
    "CGROUPS_OF_PROCESS",
    "available_cores",
    "compute_threads",
    "control_groups",
    "has_avx2",
    "set_threads_of_this_thread",
]

CGROUPS = Path("/sys/fs/cgroup")
CGROUPS_OF_PROCESS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    Counts the cores of the process's affinity mask, and fewer where a control group grants less
    processor time.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(math.ceil(min(cores, _cgroup_cores())), 1)


def _cgroup_cores(cgroups: Path = CGROUPS, of_process: Path = CGROUPS_OF_PROCESS) -> float:
    """Return the processor time that Linux grants to this process, in cores; inf for no limit.

    Containers get a share of a machine this way, although they see all of its cores. See
    ``cpu.max`` in https://docs.kernel.org/admin-guide/cgroup-v2.html, and ``cpu.cfs_quota_us`` of
    version 1.
    """
    quotas = [math.inf]
    for folder, is_version_2 in control_groups("cpu", cgroups, of_process):
        names = ("cpu.max",) if is_version_2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quotas.append(_quota(*(folder / name for name in names)))
    return min(quotas)


def control_groups(controller: str, cgroups: Path, of_process: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the groups that limit this process, and whether each is of version 2."""
    with contextlib.suppress(OSError, ValueError):
        for line in of_process.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            # Inside a container the name may be that of the machine around it. So every group on
            # the way up counts if it exists, and the topmost always exists.
            group = PurePosixPath(name.lstrip("/"))
            for ancestor in (group, *group.parents):
                if not controllers:
                    yield cgroups / ancestor, True
                elif controller in controllers.split(","):
                    yield cgroups / controller / ancestor, False


def _quota(*files: Path) -> float:
    """Return quota / period of a control group, read from one file or two."""
    try:
        quota, period = (float(word) for file in files for word in file.read_text().split())
    except (OSError, ValueError):  # no such group, or "max", which is no limit
        return math.inf
    return quota / period if quota > 0 < period else math.inf


@functools.cache
def has_avx2() -> bool:
    """Return whether torch uses x86 vectors of at least 32 bytes (AVX2 or AVX-512)."""
    import torch

    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@contextmanager
def compute_threads(count: int | None = None) -> Iterator[None]:
    """Set the number of threads that torch computes with on a CPU, and restore it on exit.

    The setting belongs to the whole process, so runs in several threads of one process share it.

    Args:
        count: Number of threads. None keeps torch's own number, limited to
            :func:`available_cores`.
    """
    import torch

    before = torch.get_num_threads()
    threads = count or min(before, available_cores())
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_threads_of_this_thread(count: int | None = None) -> None:
    """Set the number of threads that torch uses when the calling thread computes on a CPU.

    Other threads keep their number, and so do threads that start later: OpenMP holds the number for
    each thread, and torch a default for new ones, which is restored.

    Args:
        count: Number of threads. None keeps torch's own number, limited to
            :func:`available_cores`.
    """
    import torch

    with _default_threads:
        before = torch.get_num_threads()
        threads = count or min(before, available_cores())
        if threads == before:
            return
        torch.set_num_threads(threads)
        restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
        restoring.start()
        restoring.join()


_default_threads = threading.Lock()
