"""Number of cores and threads."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from support.pictures import noise
from torch import nn

from extractor import Backbone, Preprocess, extract
from extractor.system import cpu
from extractor.system.cpu import available_cores, compute_threads


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        # The smallest quota of a group and its ancestors.
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3.0),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        # Named as on the machine outside the container.
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
def test_cgroup_quota_limits_cores(
    cgroup: str, files: dict[str, str], expected: float, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(cgroup)
    for name, content in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert cpu._cgroup_cores(tmp_path / "groups", tmp_path / "cgroup") == expected


def test_no_cgroups_mean_no_limit(tmp_path: Path) -> None:
    assert cpu._cgroup_cores(tmp_path, tmp_path / "none") == math.inf


@pytest.mark.parametrize(("quota", "expected"), [(0.2, 1), (1.5, 2), (math.inf, None)])
def test_fraction_of_core_rounds_up(
    quota: float, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_cgroup_cores", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cores() == (expected or 8)


def test_torch_threads_never_exceed_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        monkeypatch.setattr(cpu, "available_cores", lambda: 3)
        with compute_threads():
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 6
        with compute_threads(5):
            assert torch.get_num_threads() == 5
        assert torch.get_num_threads() == 6
        torch.set_num_threads(2)  # a smaller number of the user's stays
        with compute_threads():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class CountsThreads(nn.Module):
    """Embed every image as the number of threads."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(pixels), 2), float(torch.get_num_threads()))


def test_threads_option_sets_torch_threads(tmp_path: Path) -> None:
    noise(0, 40, 30).save(tmp_path / "image.png")
    before = torch.get_num_threads()
    backbone = Backbone.from_module(CountsThreads(), head=None, preprocess=Preprocess.standard(8))
    for threads in (1, 3):
        out = tmp_path / f"out{threads}"
        report = extract(tmp_path / "image.png", backbone, out, threads=threads, device="cpu")
        assert report.rows == 1
        assert report.stores[0].store[0].tolist() == [threads, threads]
    assert torch.get_num_threads() == before
