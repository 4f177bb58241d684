"""Devices: which one, what it is like, and what its errors mean."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from extractor.errors import DeviceError
from extractor.system import devices
from extractor.system.devices import (
    computes,
    device_errors,
    device_name,
    empty_cache,
    is_broken_device,
    is_exclusive,
    is_out_of_memory,
    resolve_device,
    why_no_gpu,
)

GPU, CPU = torch.device("cuda", 1), torch.device("cpu")
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)"


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "not enough memory"),
        (RuntimeError("CUDA error: device-side assert\nmore"), "does not work: CUDA error"),
        (RuntimeError("all CUDA-capable devices are busy"), "does not work: all CUDA"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "does not work: cuDNN error"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
            r"^cuda:0 is out of memory; .*CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device"),
            f"this torch \\({re.escape(torch.__version__)}\\) was not built for this GPU; install",
        ),
        (
            RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
            "another process uses it, and its compute mode may allow only one",
        ),
        (
            torch.cuda.DeferredCudaCallError(
                "CUDA call failed lazily at initialization with error: device >= 0 && device < "
                "num_gpus INTERNAL ASSERT FAILED\n\nCUDA call was originally invoked at:"
            ),
            "does not work: CUDA call failed lazily .*; set CUDA_VISIBLE_DEVICES to those of this",
        ),
        (RuntimeError("CUDA error: invalid device ordinal"), "or to one MIG-... part$"),
        (MemoryError(), "^not enough memory: MemoryError; try a smaller --batch-size"),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
            "lacks this precision or layer; try --precision float32",
        ),
        (
            RuntimeError("GET was unable to find an engine to execute this computation"),
            "^cuda:0 has too little memory for a layer, or lacks its precision .*unable to find",
        ),
        (
            RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../CUDACachingAllocator'),
            "^cuda:0 is out of memory; .*NVML_SUCCESS",
        ),
    ],
)
def test_device_errors_give_advice(error: Exception, match: str) -> None:
    with pytest.raises(DeviceError, match=match), device_errors(torch.device("cuda:0")):
        raise error


def test_other_errors_pass_unchanged() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes do not fit"),
        device_errors(torch.device("cpu")),
    ):
        raise RuntimeError("shapes do not fit")


def test_only_gpus_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_name(torch.device("cuda", 3)) == "GPU 3"
    assert device_name(torch.device("cpu")) == ""


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("HIP out of memory. Tried to allocate"),
        RuntimeError("MPS backend out of memory (MPS allocated: 6.24 GB, other allocations"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate`"),
        # Of a part of a GPU in a container, where NVML does not say how full it is.
        RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../CUDACachingAllocator.cpp"'),
        # torch passes over engines of cuDNN without memory, until none is left.
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("GET was unable to find an engine to execute this computation after trying 8"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    ],
)
def test_lack_of_memory_is_recognized_in_every_library(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_broken_device(error)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa)`",
        "CUDA driver error: unknown error",
        "HIP error: invalid device function",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "cuFFT error: CUFFT_INTERNAL_ERROR",
        "Triton Error [CUDA]: device kernel image is invalid",
    ],
)
def test_broken_device_is_recognized_in_every_library(message: str) -> None:
    assert is_broken_device(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("expected scalar type Half but found Float"),
        ValueError("the file 'CUDA error: out of memory.jpg' is no image"),
    ],
)
def test_other_errors_are_none_of_the_device(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert not is_broken_device(error)


# ---------------------------------------------------------------------------------------------
# A machine whose GPUs torch cannot use


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let torch have been built for GPUs and see none; return the folder of the driver's GPUs."""

    def init() -> None:
        raise RuntimeError(f"{TOO_OLD}. Please update your GPU driver by downloading one.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices, "DRIVER_GPUS", tmp_path / "gpus")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices._warn_of_unused_gpu.cache_clear()
    return tmp_path / "gpus"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("visible", "shown"),
    [(None, "CUDA_VISIBLE_DEVICES, or"), ("MIG-0f", r"CUDA_VISIBLE_DEVICES \(now 'MIG-0f'\), or")],
)
def test_a_named_gpu_that_is_not_there_says_why(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, shown: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match=rf"no GPU is visible .*too old.*11040\)\); .*{shown}"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("visible", "is_warned"),
    [(None, True), ("0", True), ("GPU-8932f937", True), ("", False), ("-1", False)],
)
def test_auto_warns_once_of_a_gpu_that_torch_cannot_use(
    no_gpu: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    visible: str | None,
    is_warned: bool,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (no_gpu / "0000:01:00.0").mkdir(parents=True)
    for _ in range(2):
        assert resolve_device("auto") == CPU
    assert len(caplog.messages) == is_warned
    assert all(TOO_OLD in message for message in caplog.messages)


@pytest.mark.parametrize("has_driver", [False, True])
def test_auto_does_not_warn_on_a_machine_without_gpus(
    no_gpu: Path, caplog: pytest.LogCaptureFixture, has_driver: bool
) -> None:
    if has_driver:
        no_gpu.mkdir()
    assert resolve_device("auto") == CPU
    assert not caplog.messages


MISFIT = "system has unsupported display driver / cuda driver combination"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA en"),
        (RuntimeError(f"{TOO_OLD}. Please update your GPU driver"), TOO_OLD),
        (
            RuntimeError(
                "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions "
                "before calling NumCudaDevices() that might have already set an error? Error 803: "
                f"{MISFIT}\nmore"
            ),
            f"Error 803: {MISFIT}",
        ),
    ],
)
def test_the_reason_is_what_matters_of_torchs_words(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def init() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "init", init)
    assert why_no_gpu().startswith(reason)
    assert "more" not in why_no_gpu()


# ---------------------------------------------------------------------------------------------
# GPUs, with stand-ins


class Driver:
    """A library of the driver that answers for the second device only."""

    def __init__(self, attributes: dict[int, int]) -> None:
        self.attributes = attributes

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:  # noqa: N802
        if device != GPU.index or attribute not in self.attributes:
            return 1
        value._obj.value = self.attributes[attribute]
        return 0


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({20: 0, 133: 0}, False),  # compute mode, MPS
        ({20: 3, 133: 0}, True),
        ({20: 3, 133: 1}, False),  # MPS lets several processes share a device in this mode
        ({20: 3}, True),  # a driver that does not know MPS
        ({}, False),
    ],
)
def test_compute_mode_is_that_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, attributes: dict[int, int], expected: bool
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: Driver(attributes))
    assert is_exclusive(GPU) is expected
    assert not is_exclusive(CPU)


@pytest.mark.parametrize("library", [object(), None])
def test_without_a_driver_of_nvidia_no_gpu_is_exclusive(
    monkeypatch: pytest.MonkeyPatch, library: object
) -> None:
    def load(name: str) -> object:
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr("ctypes.CDLL", load)
    assert not is_exclusive(GPU)


def test_cache_is_emptied_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [torch.device("cuda", 0)]
    emptied = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(current[-1]))
    empty_cache(GPU)
    empty_cache(CPU)
    assert emptied == [GPU]


@pytest.mark.parametrize("is_broken", [False, True])
def test_only_a_device_that_answers_still_computes(
    monkeypatch: pytest.MonkeyPatch, is_broken: bool
) -> None:
    ones = torch.ones

    def ones_on_gpu(count: int, device: torch.device) -> torch.Tensor:
        assert device == GPU
        if is_broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return ones(count)

    monkeypatch.setattr(torch, "ones", ones_on_gpu)
    assert computes(GPU) is not is_broken
    assert not computes(CPU)


@pytest.mark.cuda
def test_compute_mode_is_that_of_nvidia_smi() -> None:
    torch.zeros(1, device="cuda:0")
    query = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader", "--id=0"]
    mode = ""
    if shutil.which(query[0]):
        mode = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    assert is_exclusive(torch.device("cuda", 0)) == (mode == "Exclusive_Process")


ASSERTING = """
import torch
from extractor.system.devices import computes, device_errors
device = torch.device("cuda", 0)
assert computes(device)
try:
    with device_errors(device):
        torch.zeros(1, device=device)[torch.tensor([5], device=device)].cpu()
except Exception as error:
    print(type(error).__name__, error, computes(device), flush=True)
"""


@pytest.mark.cuda
def test_a_gpu_does_not_compute_after_a_failed_assertion() -> None:
    done = subprocess.run([sys.executable, "-c", ASSERTING], capture_output=True, text=True)
    assert done.stdout.startswith("DeviceError cuda:0 does not work: CUDA error: device-side")
    assert done.stdout.endswith("False\n")


@pytest.mark.cuda
def test_gpu_has_a_name() -> None:
    assert device_name(torch.device("cuda", 0)) == torch.cuda.get_device_properties(0).name


@pytest.mark.cuda
def test_lack_of_memory_of_a_gpu_is_recognized() -> None:
    too_much = torch.cuda.get_device_properties(0).total_memory * 2
    with pytest.raises(DeviceError, match=r"^cuda:0 is out of memory; try"):  # noqa: SIM117
        with device_errors(torch.device("cuda", 0)):
            torch.empty(too_much, dtype=torch.uint8, device="cuda:0")
