"""Devices: find the requested one, and turn its failures into errors with advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from extractor.errors import DeviceError

__all__ = ["device_errors", "device_name", "resolve_device"]


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
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(
            f"{device} is out of memory; try a smaller --batch-size or --precision float16, or "
            f"stop other programs on it ({_first_line(error)})"
        ) from error
    except RuntimeError as error:
        if "allocate memory" in str(error):  # torch's allocator for the CPU
            raise DeviceError(
                f"not enough memory: {_first_line(error)}; try a smaller --batch-size"
            ) from error
        if "CUDA error" in str(error) or "CUDA-capable device" in str(error):
            raise DeviceError(
                f"{device} does not work: {_first_line(error)}; it may be busy or need a restart: "
                "check nvidia-smi, or use --device cpu"
            ) from error
        raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]
