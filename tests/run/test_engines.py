"""Runs that a cluster computes: what this machine decides where it has no such device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import extractor.run.engines as engines
import extractor.run.session as session_module
from extractor import extract
from extractor.errors import DeviceError, InterruptedRunError
from extractor.lease.sharing import WorkerSlot
from extractor.loading.crash_log import CrashLog
from extractor.options import Options
from extractor.store.format import STAGING, SUSPECTS
from extractor.workers.ray_cluster import Node, device_of_cluster
from extractor.workers.trial import Trial, run_trial

NETWORK = """
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, pixels):
        return self.fc(pixels.mean((2, 3)))

def build():
    return Network()
"""
ON_GPU = {
    "precision": "float16",
    "least_cosine": 0.9999,
    "compiled": True,
    "device": "cuda",
    "device_name": "NVIDIA A100",
    "batch_size": 128,
    "decode": "scaled",
}


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Stand for a cluster that answers."""
    yield


@pytest.fixture
def network(tmp_path: Path) -> str:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/network.py").write_text(NETWORK, "utf-8")
    return f"{tmp_path}/code/network.py:build"


def test_a_cluster_with_gpus_decides_for_a_driver_without(
    network: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[Trial] = []
    described: list[dict[str, Any]] = []

    def on_cluster(trial: Trial) -> list[dict[str, Any]]:
        trials.append(trial)
        return [ON_GPU]

    def compute(leased: Any, computing: Any) -> None:
        described.extend(t.description.computation for p in leased.plan.passes for t in p.stores)
        raise DeviceError("enough")

    monkeypatch.setattr(engines, "ray_cluster", connected)
    monkeypatch.setattr(engines, "device_of_cluster", lambda options: "cuda")
    monkeypatch.setattr(session_module, "run_trial_on_cluster", on_cluster)
    monkeypatch.setattr(session_module, "compute", compute)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(DeviceError, match="enough"):
        extract(photos, network, tmp_path / "out", engine="ray", address="10.0.0.1:6379")

    assert described == [ON_GPU]
    (trial,) = trials
    assert trial.options.device == "cuda"
    assert trial.settings.batch_size == 128  # the default of a GPU
    assert trial.settings.choose_precision
    assert len(trial.sample) == 11


def test_a_trial_says_what_a_run_there_would_record(
    network: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(photos, network, tmp_path / "out")
    expected = json.loads((tmp_path / "out/store.json").read_bytes())["computation"]
    trials: list[Trial] = []

    def on_cluster(trial: Trial) -> list[dict[str, Any]]:
        trials.append(trial)
        raise DeviceError("enough")

    monkeypatch.setattr(engines, "ray_cluster", connected)
    monkeypatch.setattr(engines, "device_of_cluster", lambda options: "cpu")
    monkeypatch.setattr(session_module, "device_elsewhere", lambda options, specs: "cpu")
    monkeypatch.setattr(session_module, "run_trial_on_cluster", on_cluster)
    with pytest.raises(DeviceError, match="enough"):
        extract(photos, network, tmp_path / "new", engine="ray", address="10.0.0.1:6379")

    assert run_trial(trials[0]) == [expected]


@pytest.mark.parametrize(
    ("device", "gpus", "expected"), [("auto", 0, "cpu"), ("auto", 8, "cuda"), ("cpu", 8, "cpu")]
)
def test_auto_is_the_device_of_the_cluster(
    device: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [Node(4, 0), Node(16, gpus)]
    monkeypatch.setattr("extractor.workers.ray_cluster.nodes_of_cluster", lambda: nodes)
    assert device_of_cluster(Options(device=device)) == expected


# ---------------------------------------------------------------------------------------------
# GPUs of this machine, with stand-ins

GIB = 2**30


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have GPUs of 80, 24 and 4 GiB; others use half of the second one."""
    totals = [80 * GIB, 24 * GIB, 4 * GIB]
    free = [70 * GIB, 11 * GIB, 3 * GIB]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(totals))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda n: SimpleNamespace(total_memory=totals[n])
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("device", "devices", "expected"),
    [
        ("cuda:0", None, 71),  # free, and what this process keeps
        ("cuda:1", None, 12),
        ("cuda:0", "0", 71),
        ("cuda:0", "0,1", 24),
        ("cuda:1", "1,0", 12),
        ("cuda:0", "all", 4),
        ("cuda:0", "0,9", 71),  # refused later
        ("cpu", None, 0),
        ("cpu", "cpu", 0),
    ],
)
def test_memory_is_that_of_the_gpus_of_the_run(
    device: str, devices: str | None, expected: int
) -> None:
    found = engines._least_gpu_bytes(Options(devices=devices), torch.device(device))
    assert found == expected * GIB


def test_a_gpu_that_does_not_answer_is_an_error_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(device: object) -> tuple[int, int]:
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    with pytest.raises(DeviceError, match="cuda:0 does not work: CUDA error: unknown error"):
        engines._least_gpu_bytes(Options(), torch.device("cuda", 0))


def slots_of(*devices: str) -> list[WorkerSlot]:
    return [WorkerSlot(number, device, 1, 1, 1) for number, device in enumerate(devices)]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["A100", "A100", "T400", "A100"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize("devices", [["cpu"] * 3, ["cuda:2"], ["cuda:0", "cuda:3", "cuda:0"]])
def test_gpus_of_one_kind_share_a_run(devices: list[str]) -> None:
    engines._check_same_kind(slots_of(*devices))


@pytest.mark.usefixtures("kinds")
def test_gpus_of_several_kinds_are_refused_before_any_worker_starts() -> None:
    with pytest.raises(
        DeviceError, match=r"GPU 0 is 'A100' and GPU 2 'T400', .* try --devices 0,1,3"
    ):
        engines._check_same_kind(slots_of("cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0"))


@pytest.mark.cuda
def test_memory_of_a_gpu_is_what_is_free_and_what_is_kept() -> None:
    device = torch.device("cuda", 0)
    kept = torch.zeros(2**28, dtype=torch.uint8, device=device)
    total = torch.cuda.get_device_properties(device).total_memory
    for devices in (None, "0"):  # other programs may take and free memory meanwhile
        assert kept.nbytes <= engines._least_gpu_bytes(Options(devices=devices), device) <= total


@pytest.mark.parametrize("devices", ["all", "0,1"])
def test_devices_without_a_gpu_name_the_option_that_was_typed(
    devices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with (
        pytest.raises(DeviceError, match=f"^devices: got {devices}; .*, or use --devices cpu$"),
        engines.engine_for(Options(devices=devices)),
    ):
        pass


def test_image_of_a_worker_that_did_not_end_by_itself_is_a_suspect(
    network: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its decoder may hang. Otherwise the next run would hang at the same image, and so on."""
    image = sorted(photos.iterdir())[0]

    class Hanging:
        def __init__(self, setups: Any, *_: object) -> None:
            self.log = setups[0].crash_log

        def run(self) -> None:
            log = CrashLog(self.log, 1)
            log.__enter__()
            log.note(0, bytes(image))
            raise InterruptedRunError(0, 11)  # after all workers were killed

    monkeypatch.setattr(engines, "LocalWorkers", Hanging)
    with pytest.raises(InterruptedRunError, match="stopped after 0 of 11 images"):
        extract(photos, network, tmp_path / "out", devices="cpu", processes=1)
    assert json.loads((tmp_path / "out" / STAGING / SUSPECTS).read_text()) == [str(image)]
