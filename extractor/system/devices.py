"""Devices: find the requested one, and turn its failures into errors with advice."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from extractor.errors import DeviceError
from extractor.text import first_line

__all__ = [
    "advice_for",
    "computes",
    "device_errors",
    "device_name",
    "empty_cache",
    "is_broken_device",
    "is_exclusive",
    "is_out_of_memory",
    "on_cpu_by_default",
    "resolve_device",
    "why_no_gpu",
]

log = logging.getLogger(__name__)

# What torch's allocators, CUDA and the libraries above it say when no memory is left.
# - A library that cannot even make its handle (NOT_INITIALIZED) most often lacks the memory for it.
# - torch asks NVML how full the device is before it says so. In a container with a part of a GPU
#   (MIG), NVML may refuse, and only this assertion is raised.
# - torch tries all engines of cuDNN, passes over those without memory, and says that none is left.
#   So does a device that lacks an engine, which then fails with a single image, too.
NO_ENGINE = "unable to find an engine to execute|Unable to find a valid cuDNN algorithm"
FULL = re.compile(
    r"out of memory|(CU|HIP|MIO)\w*ALLOC\w*FAILED|CU(DNN|BLAS)_STATUS_NOT_INITIALIZED"
    rf"|NVML_SUCCESS == |{NO_ENGINE}",
    re.IGNORECASE,
)
FULL_HOST = "allocate memory"  # torch's allocator for the CPU

# What they say when they fail in any other way.
BROKEN = re.compile(
    r"(CUDA|HIP)( driver)? error|CUDA-capable device|Triton Error \[CUDA\]|MIOpen error"
    r"|cu(DNN|BLAS|BLASLt|FFT|SOLVER|SPARSE) error|CU(DNN|BLAS|FFT|SOLVER|SPARSE)_\w+"
    r"|CUDA call failed lazily|num_gpus INTERNAL ASSERT",
    re.IGNORECASE,
)

# What to do about some of these errors, by what they say.
ADVICE = (
    (
        r"no kernel image|invalid device function|ARCH_MISMATCH",
        "this torch ({torch}) was not built for this GPU; install a build that was, or use "
        "--device cpu",
    ),
    (
        r"busy or unavailable|devices are busy",
        "another process uses it, and its compute mode may allow only one (see nvidia-smi); stop "
        "the other, or leave out --processes",
    ),
    (
        r"num_gpus INTERNAL ASSERT|invalid device ordinal",
        "CUDA shows fewer GPUs than the driver has, as where they are cut into parts (MIG); set "
        "CUDA_VISIBLE_DEVICES to those of this job, or to one MIG-... part",
    ),
    (r"NOT_SUPPORTED", "it lacks this precision or layer; try --precision float32"),
)
USUAL_ADVICE = "it may be busy, full or need a restart: check nvidia-smi, or use --device cpu"

# Folder of the GPUs that NVIDIA's driver manages, and values of CUDA_VISIBLE_DEVICES that hide all.
DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
NONE_VISIBLE = ("", "-1", "NoDevFiles")

# Attributes of a device, and a value of the first one: cuda.h.
COMPUTE_MODE, MPS_ENABLED = 20, 133
EXCLUSIVE_PROCESS = 3
DRIVER = "libcuda.so.1"


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` takes the first CUDA device, else Apple's GPU, else the CPU, with a warning if there
    is a GPU that torch cannot use. The caller reports which one it was.

    Raises:
        DeviceError: The name is unknown, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        _warn_of_unused_gpu()
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
            f"device {name}: no GPU is visible ({why_no_gpu()}); check nvidia-smi and "
            f"CUDA_VISIBLE_DEVICES{_visible_devices()}, or use --device cpu"
        )
    index = device.index or 0
    if index >= count:
        raise DeviceError(f"device {name}: only cuda:0 to cuda:{count - 1} are visible")
    return torch.device("cuda", index)


def why_no_gpu() -> str:
    """Return why torch can use no GPU, in what matters of its own words."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:
        # CUDA's own words come last; what to do about a missing driver is left out.
        text = str(error)
        found = re.search(r"Error \d+: .*", text)
        return found[0] if found else first_line(error).partition(". Please")[0]
    return "torch counts none"


def _visible_devices() -> str:
    """Return the value of ``CUDA_VISIBLE_DEVICES`` for a message; nothing if it is not set."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if value is None else f" (now {value!r})"


@functools.cache
def _warn_of_unused_gpu() -> None:
    """Warn once if there is a GPU of NVIDIA that nobody hides, and torch cannot use it."""
    with contextlib.suppress(OSError):
        is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in NONE_VISIBLE
        if not is_hidden and any(DRIVER_GPUS.iterdir()):
            log.warning(
                "computing on the CPU: there is a GPU, but torch %s cannot use it (%s); extract "
                "doctor says more, and --device cpu hides this",
                *(torch.__version__, why_no_gpu()),
            )


def is_exclusive(device: torch.device) -> bool:
    """Return whether a GPU lets only one process use it: its compute mode, without NVIDIA's MPS.

    torch does not tell. Call it once torch has used the device.
    """
    if device.type != "cuda":
        return False
    mode, shared = ctypes.c_int(), ctypes.c_int()
    try:
        attribute = ctypes.CDLL(DRIVER).cuDeviceGetAttribute
        failed = attribute(ctypes.byref(mode), COMPUTE_MODE, device.index or 0)
        attribute(ctypes.byref(shared), MPS_ENABLED, device.index or 0)  # unknown to old drivers
    except (OSError, AttributeError):  # ROCm
        return False
    return not failed and mode.value == EXCLUSIVE_PROCESS and not shared.value


def empty_cache(device: torch.device) -> None:
    """Give the memory that torch keeps of a GPU back to others.

    ``torch.cuda.empty_cache()`` alone would take memory of the first GPU, whatever GPU is in use.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def computes(device: torch.device) -> bool:
    """Return whether a GPU still computes after an error; after some it refuses everything."""
    if device.type != "cuda":
        return False
    try:
        return float((torch.ones(1, device=device) + 1).cpu()) == 2
    except RuntimeError:
        return False


def on_cpu_by_default() -> AbstractContextManager[object]:
    """Return a context in which the program's :func:`torch.set_default_device` has no effect."""
    if torch.get_default_device().type == "cpu":
        return nullcontext()
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, such as ``NVIDIA A100-SXM4-40GB``; empty for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Raise :class:`DeviceError` with advice where a device is full, busy or broken."""
    try:
        yield
    except (RuntimeError, MemoryError, torch.cuda.DeferredCudaCallError) as error:
        line = first_line(error)
        if _is_full_host(error):
            raise DeviceError(f"not enough memory: {line}; try a smaller --batch-size") from error
        if re.search(NO_ENGINE, str(error)):
            raise DeviceError(
                f"{device} has too little memory for a layer, or lacks its precision ({line}); try "
                "a smaller --batch-size or --precision float32"
            ) from error
        if is_out_of_memory(error):
            raise DeviceError(
                f"{device} is out of memory; try a smaller --batch-size or --precision float16, or "
                f"stop other programs on it ({line})"
            ) from error
        if is_broken_device(error):
            raise DeviceError(f"{device} does not work: {line}; {advice_for(error)}") from error
        raise


def advice_for(error: BaseException) -> str:
    """Return what to do about an error of a GPU."""
    advice = next((text for cause, text in ADVICE if re.search(cause, str(error))), USUAL_ADVICE)
    return advice.format(torch=torch.__version__)


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
        isinstance(error, (RuntimeError, torch.cuda.DeferredCudaCallError))
        and BROKEN.search(str(error)) is not None
        and not is_out_of_memory(error)
    )
