"""Devices: find the requested one, and turn its failures into errors with advice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from extractor.errors import DeviceError
from extractor.text import first_line

__all__ = [
    "device_errors",
    "device_name",
    "is_broken_device",
    "is_out_of_memory",
    "resolve_device",
]

# What torch's allocators, CUDA and the libraries above it say when no memory is left. A library
# that cannot even make its handle (NOT_INITIALIZED) most often lacks the memory for it.
FULL = re.compile(
    r"out of memory|(CU|HIP|MIO)\w*ALLOC\w*FAILED|CU(DNN|BLAS)_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)
FULL_HOST = "allocate memory"  # torch's allocator for the CPU

# What they say when they fail in any other way.
BROKEN = re.compile(
    r"(CUDA|HIP)( driver)? error|CUDA-capable device|Triton Error \[CUDA\]|MIOpen error"
    r"|cu(DNN|BLAS|BLASLt|FFT|SOLVER|SPARSE) error|CU(DNN|BLAS|FFT|SOLVER|SPARSE)_\w+"
    r"|unable to find an engine to execute",
    re.IGNORECASE,
)


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` takes the first CUDA device, else Apple's GPU, else the CPU. The caller reports which
    one it was.

    Raises:
        DeviceError: The name is unknown, or this machine has no such device.
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
        raise DeviceError(
            f"device: got unknown device {name!r}, expected auto, cpu, cuda, cuda:N or mps"
        )
    if device.type == "cuda":
        return _cuda(name, device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps: this machine has no Apple GPU; try --device cpu")
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


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, such as ``NVIDIA A100-SXM4-40GB``; empty for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Raise :class:`DeviceError` with advice where a device is full, busy or broken."""
    try:
        yield
    except RuntimeError as error:
        line = first_line(error)
        if _is_full_host(error):
            raise DeviceError(f"not enough memory: {line}; try a smaller --batch-size") from error
        if is_out_of_memory(error):
            raise DeviceError(
                f"{device} is out of memory; try a smaller --batch-size or --precision float16, or "
                f"stop other programs on it ({line})"
            ) from error
        if is_broken_device(error):
            raise DeviceError(
                f"{device} does not work: {line}; it may be busy or need a restart: "
                "check nvidia-smi, or use --device cpu"
            ) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device is used up, the CPU included."""
    return (
        isinstance(error, torch.cuda.OutOfMemoryError)
        or _is_full_host(error)
        or (isinstance(error, RuntimeError) and FULL.search(str(error)) is not None)
    )


def _is_full_host(error: BaseException) -> bool:
    """Return whether an error says that the memory of the CPU is used up."""
    is_of_torch = isinstance(error, RuntimeError) and FULL_HOST in str(error)
    return is_of_torch or isinstance(error, MemoryError)


def is_broken_device(error: BaseException) -> bool:
    """Return whether an error comes from a GPU or its libraries, and is not of lack of memory.

    The GPU may refuse everything from then on.
    """
    return (
        isinstance(error, RuntimeError)
        and BROKEN.search(str(error)) is not None
        and not is_out_of_memory(error)
    )
