"""Which device computes, and in which precision; nothing falls back in silence."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch

from extractor.errors import DeviceError

__all__ = [
    "available_cores",
    "compute_threads",
    "device_errors",
    "has_avx2",
    "resolve_device",
]

OWN_GROUPS = Path("/proc/self/cgroup")


def resolve_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``, checked to be there.

    ``auto`` takes the first CUDA device, else Apple's GPU, else the CPU; which one it was is for
    the caller to report.

    Raises:
        DeviceError: an unknown name or an absent device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        return _cuda(name, device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps: no Apple GPU here; try --device cpu")
    return device


def _cuda(name: str, device: torch.device) -> torch.device:
    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError(
            f"device {name}: this torch ({torch.__version__}) was built without GPU support; "
            "install a CUDA build of torch and torchvision, or use --device cpu"
        )
    count = torch.cuda.device_count()
    if not count or not torch.cuda.is_available():
        raise DeviceError(
            f"device {name}: no GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use "
            "--device cpu"
        )
    index = device.index or 0
    if index >= count:
        raise DeviceError(f"device {name}: only cuda:0 to cuda:{count - 1} are visible")
    return torch.device("cuda", index)


def available_cores() -> int:
    """Processor cores that this process may run on, or may use the time of, if those are fewer."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(math.ceil(min(cores, _cores_of_group())), 1)


def _cores_of_group(groups: Path = Path("/sys/fs/cgroup"), own: Path = OWN_GROUPS) -> float:
    """Cores' worth of time that the scheduler grants to this process's control groups (Linux).

    That is how containers are given a share of a machine: they still see all of its cores. See
    ``cpu.max`` in https://docs.kernel.org/admin-guide/cgroup-v2.html, and ``cpu.cfs_quota_us`` of
    the version before.
    """
    grants = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            # Within a container the names may be those of the machine around it: each group that
            # is there counts, the topmost among them.
            place = PurePosixPath(name.lstrip("/"))
            for part in (place, *place.parents):
                if not controllers:
                    grants.append(_granted(groups / part / "cpu.max"))
                elif "cpu" in controllers.split(","):
                    folder = groups / "cpu" / part
                    grants.append(
                        _granted(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
                    )
    return min(grants)


def _granted(*files: Path) -> float:
    """Microseconds of processor time, by the microseconds in which they may be used."""
    try:
        quota, period = (float(word) for file in files for word in file.read_text().split())
    except (OSError, ValueError):  # the group is not there, or "max": as much as there is
        return math.inf
    return quota / period if quota > 0 < period else math.inf


@functools.cache
def has_avx2() -> bool:
    """Whether torch computes with the vectors of an x86 processor, of 32 bytes or more."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@contextmanager
def compute_threads(count: int | None = None) -> Iterator[None]:
    """Let torch compute with so many threads meanwhile, on a CPU.

    It is a setting of the whole process, and not for several runs at a time in one. None leaves
    torch its own number, where that is no more than :func:`available_cores`.
    """
    before = torch.get_num_threads()
    wanted = count or min(before, available_cores())
    if wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Turn what a device says when it is full, busy or broken into a :class:`DeviceError`."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(
            f"{device} is out of memory; try a smaller --batch-size or --precision float16, or "
            f"stop what else runs on it ({_first_line(error)})"
        ) from error
    except RuntimeError as error:
        if "allocate memory" in str(error):  # what the allocator of the CPU says
            raise DeviceError(
                f"not enough memory: {_first_line(error)}; try a smaller --batch-size"
            ) from error
        if "CUDA error" in str(error) or "CUDA-capable device" in str(error):
            raise DeviceError(
                f"{device} refuses to work: {_first_line(error)}; it may be busy or in need of a "
                "restart: check nvidia-smi, or use --device cpu"
            ) from error
        raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]
