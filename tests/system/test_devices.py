"""Errors of devices."""

from __future__ import annotations

import pytest
import torch

from extractor.errors import DeviceError
from extractor.system.devices import (
    device_errors,
    device_name,
    is_broken_device,
    is_out_of_memory,
)


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
        "FIND was unable to find an engine to execute this computation",
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


@pytest.mark.cuda
def test_gpu_has_a_name() -> None:
    assert device_name(torch.device("cuda", 0)) == torch.cuda.get_device_properties(0).name


@pytest.mark.cuda
def test_lack_of_memory_of_a_gpu_is_recognized() -> None:
    too_much = torch.cuda.get_device_properties(0).total_memory * 2
    with pytest.raises(DeviceError, match=r"^cuda:0 is out of memory; try"):  # noqa: SIM117
        with device_errors(torch.device("cuda", 0)):
            torch.empty(too_much, dtype=torch.uint8, device="cuda:0")
