"""Runs that a cluster computes: what this machine decides where it has no such device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import extractor.run.engines as engines
import extractor.run.session as session_module
from extractor import extract
from extractor.errors import DeviceError
from extractor.options import Options
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
