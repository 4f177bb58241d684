"""Fixtures of all tests: no network, one thread, generated images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.pictures import color

pytest_plugins = ["support.stores"]

REQUIRE_CUDA = os.environ.get("EXTRACTOR_REQUIRE_CUDA") == "1"


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for child processes, too
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # pytest-xdist's controller runs no test
    import torch

    torch.set_num_threads(1)  # the networks are small: a second thread costs more than it gives


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A fork takes longer the more memory a worker holds: tests that fork at every step come first.
    items.sort(key=lambda item: item.path.name != "test_crashes.py")
    if not any(item.get_closest_marker("cuda") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let a skipped test of a GPU fail where a GPU is required, whatever skipped it."""
    outcome: Any = yield
    report = outcome.get_result()
    if REQUIRE_CUDA and report.skipped and item.get_closest_marker("cuda"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"EXTRACTOR_REQUIRE_CUDA=1 allows no skipped test: {reason}"


@pytest.fixture(autouse=True)
def empty_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of weights: no test depends on what this machine has downloaded."""
    from huggingface_hub import constants

    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "huggingface" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


@pytest.fixture(
    params=[pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.cuda)]
)
def device(request: pytest.FixtureRequest) -> str:
    """Name of a device: the CPU, and a GPU if there is one."""
    return str(request.param)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder of 11 images of one color each, in several sizes, formats and subfolders.

    Image ``i`` has the color ``(20 * i, 255 - 20 * i, 100)``, stored losslessly, so that the
    embedding of a model that averages pixels can be computed by hand.
    """
    folder = tmp_path / "photos"
    for i in range(11):
        path = folder / ("deep/er" if i % 3 else "") / f"{i:02d}.{('png', 'bmp', 'tiff')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + 7 * i, 90 - 5 * i), color(i)).save(path)
    return folder
