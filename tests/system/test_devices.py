"""How many cores and threads there are to compute with."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from support.pictures import noise
from torch import nn

from extractor import Backbone, Preprocess, extract
from extractor.system import devices
from extractor.system.devices import available_cores, compute_threads


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        # The least of a group and of those around it.
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        # Named as on the machine around the container.
        ("0::/docker/0123\n", {"cpu.max": "400000 100000"}, 4.0),
        ("0::/../../x\n", {"cpu.max": "400000 100000"}, 4.0),
        # Version 1, where -1 is no limit.
        (
            "3:memory:/\n2:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "150000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            1.5,
        ),
        (
            "1:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
        ("nonsense", {"cpu.max": "100000 100000"}, math.inf),
        ("0::/\n", {"cpu.max": "nonsense"}, math.inf),
        ("0::/\n", {"cpu.max": "100000 0"}, math.inf),
    ],
)
def test_a_container_has_the_cores_that_it_is_granted(
    own: str, files: dict[str, str], expected: float, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own)
    for name, content in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert devices._cores_of_group(tmp_path / "groups", tmp_path / "own") == expected


def test_without_control_groups_all_cores_are_there(tmp_path: Path) -> None:
    assert devices._cores_of_group(tmp_path, tmp_path / "none") == math.inf


@pytest.mark.parametrize(("granted", "expected"), [(0.2, 1), (1.5, 2), (math.inf, None)])
def test_part_of_a_core_counts_as_one(
    granted: float, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_cores_of_group", lambda: granted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cores() == (expected or 8)


def test_torch_gets_no_more_threads_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        monkeypatch.setattr(devices, "available_cores", lambda: 3)
        with compute_threads():
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 6
        with compute_threads(5):
            assert torch.get_num_threads() == 5
        assert torch.get_num_threads() == 6
        torch.set_num_threads(2)  # what someone chose is no less than what there is
        with compute_threads():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class CountsThreads(nn.Module):
    """Embeds every image as the number of threads."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(pixels), 2), float(torch.get_num_threads()))


def test_a_run_computes_with_the_threads_that_it_is_told(tmp_path: Path) -> None:
    noise(0, 40, 30).save(tmp_path / "image.png")
    before = torch.get_num_threads()
    backbone = Backbone.from_module(CountsThreads(), head=None, preprocess=Preprocess.standard(8))
    for threads in (1, 3):
        out = tmp_path / f"out{threads}"
        report = extract(tmp_path / "image.png", backbone, out, threads=threads, device="cpu")
        assert report.rows == 1
        assert report.stores[0].store[0].tolist() == [threads, threads]
    assert torch.get_num_threads() == before
