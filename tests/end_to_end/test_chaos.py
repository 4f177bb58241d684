"""The real command, killed at random while its folder changes, ends with the right store."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.commands import WarmProcess, run_python
from support.disks import small_disk_at
from support.pictures import noise

from extractor import FeatureStore
from extractor.upkeep.verify import verify

KILLS = int(os.environ.get("EXTRACTOR_TEST_KILLS", "3"))
GRACE_SECONDS = 20.0  # a second on a quiet machine


def arguments(photos: Path, out: Path) -> list[str]:
    model = ["-m", "torchvision:squeezenet1_1", "--weights", "random", "--device", "cpu"]
    sizes = ["-b", "4", "--shard-images", "50", "--image-size", "160"]
    # Runs that were killed let removals add up to more than a run retires without being asked.
    rest = ["--retire", "--quiet", str(photos), "-o", str(out)]
    return ["-m", "extractor", *model, *sizes, *rest]


def has_lock(process: int, out: Path) -> bool:
    try:
        return f"process {process} " in (out / ".extractor-partial/lock").read_text()
    except FileNotFoundError:
        return False


class Folder:
    """Folder of images that changes at random. No two files have the same content."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path = path
        self._rng = rng
        self._count = 0
        path.mkdir()
        for _ in range(200):
            self._write(self._new())

    def change(self) -> None:
        paths = sorted(self.path.iterdir())
        for path in self._rng.sample(paths, 6):
            path.unlink()
        for path in self._rng.sample(sorted(self.path.iterdir()), 6):
            self._write(path)
        for path in self._rng.sample(sorted(self.path.iterdir()), 2):
            path.write_text(f"no image {self._rng.random()}")
        for _ in range(10):
            self._write(self._new())

    def _new(self) -> Path:
        return self.path / f"{self._rng.randrange(10**9):09d}.jpg"

    def _write(self, path: Path) -> None:
        self._count += 1
        noise(self._count, 40 + self._count % 7, 40).save(path)
        os.utime(path, ns=(10**18, 10**18 + self._count))


@pytest.mark.slow
def test_store_matches_changing_folder_despite_kills(
    tmp_path: Path,
) -> None:
    rng = random.Random(4)
    folder, out = Folder(tmp_path / "in", rng), tmp_path / "out"
    midway = 0
    for turn in range(KILLS):
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        with WarmProcess(arguments(folder.path, out)) as run:
            while run.poll() is None and not has_lock(run.pid, out):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.4))
            sent = time.monotonic()
            run.send_signal(number)
            run.wait()
        errors = run.errors()
        assert "Traceback" not in errors, turn
        ended = {signal.SIGKILL: -9, signal.SIGINT: 130}.get(number, 143)
        assert run.returncode in (ended, 0, 3), errors
        if run.returncode == ended:
            midway += 1
            assert time.monotonic() - sent < GRACE_SECONDS
        folder.change()
    assert midway >= KILLS // 2
    done = run_python(*arguments(folder.path, out))
    assert done.returncode == 3, done.stderr
    fresh = tmp_path / "fresh"
    run_python(*arguments(folder.path, fresh))
    store, expected = FeatureStore.open(out), FeatureStore.open(fresh)
    assert sorted(store.paths) == expected.paths
    rows = [store.index_of(path) for path in expected.paths]
    np.testing.assert_allclose(store[rows], expected.features[:], rtol=1e-4, atol=1e-5)
    assert store.failures == expected.failures
    assert store.manifest.listing == expected.manifest.listing
    assert not list(verify(out))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Separate file system with little room."""
    with small_disk_at(tmp_path / "disk", "400k") as disk:
        yield disk


def test_same_command_resumes_once_disk_has_room(tmp_path: Path, small_disk: Path) -> None:
    folder = Folder(tmp_path / "in", random.Random(5))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(100 * 2**10))
    out = small_disk / "out"
    failed = run_python(*arguments(folder.path, out))
    assert failed.returncode == 1
    assert "are needed and" in failed.stderr  # seen before anything was computed
    quiet = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    (tmp_path / "sitecustomize.py").write_text(
        "import shutil\n"
        "usage = shutil.disk_usage\n"
        "shutil.disk_usage = lambda path: usage(path)._replace(free=10**12)\n"
    )
    failed = run_python(*arguments(folder.path, out), env=quiet)
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    assert not (out / "store.json").exists()
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    done = run_python(*arguments(folder.path, out))
    assert done.returncode == 0, done.stderr
    assert len(FeatureStore.open(out)) == 200
    assert not list(verify(out))
