"""Errors of devices."""

from __future__ import annotations

import pytest
import torch

from extractor.errors import DeviceError
from extractor.system.devices import device_errors, device_name


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "not enough memory"),
        (RuntimeError("CUDA error: device-side assert\nmore"), "does not work: CUDA error"),
        (RuntimeError("all CUDA-capable devices are busy"), "does not work: all CUDA"),
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
