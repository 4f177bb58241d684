"""What is said about GPUs, with stand-ins for torch and the driver."""

from __future__ import annotations

import pytest
import torch

from extractor.doctor import packages
from extractor.doctor.finding import Finding
from extractor.system import devices

GIB = 2**30
DRIVERS = ["NVIDIA A100, 550.54.15, 40000 MiB"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have one GPU, on which nothing is computed."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda count, device: ones(count))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * GIB, 40 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    monkeypatch.setattr(packages, "_drivers", lambda: DRIVERS)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("exclusive", [False, True])
def test_a_gpu_is_described_with_its_compute_mode(
    monkeypatch: pytest.MonkeyPatch, exclusive: bool
) -> None:
    monkeypatch.setattr(devices, "is_exclusive", lambda device: exclusive)
    found = packages._cuda(0)
    expected = "NVIDIA A100, 10.0 GiB of 40.0 GiB free"
    expected += ", for one process at a time" if exclusive else ""
    assert (found.state, found.text) == ("ok", f"{expected}, driver 550.54.15")
    assert found.details.get("exclusive", False) is exclusive


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("CUDA error: no kernel image is available for execution", "was not built for this GPU"),
        ("CUDA-capable device(s) is/are busy or unavailable", "its compute mode may allow only"),
        ("CUDA error: unknown error", "check nvidia-smi, or use --device cpu"),
    ],
)
def test_a_gpu_that_does_not_work_gets_the_advice_of_a_run(
    monkeypatch: pytest.MonkeyPatch, message: str, advice: str
) -> None:
    def ones(count: int, device: str) -> torch.Tensor:
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "ones", ones)
    found = packages._cuda(0)
    assert (found.state, found.text) == ("warning", f"does not work: {message}")
    assert advice in found.advice


@pytest.mark.parametrize(("driver", "count"), [(DRIVERS, 1), ([], 0)])
def test_a_gpu_of_the_driver_that_torch_does_not_see_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, driver: list[str], count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(packages, "_drivers", lambda: driver)
    monkeypatch.setattr(devices, "why_no_gpu", lambda: "the driver is too old")
    _, *found = packages._devices()
    assert len(found) == count
    assert [each for each in found if isinstance(each, Finding) and each.state == "ok"] == []
    for each in found:
        assert each.text.endswith("but torch sees no GPU (the driver is too old)")
