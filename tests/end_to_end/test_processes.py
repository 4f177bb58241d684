"""Several processes make the store of one process, whatever happens to them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import WarmProcess, run_python
from support.disks import small_disk_at
from support.hostile_decoder import hostile_python, write_hostile
from support.pictures import noise
from support.stores import content

from extractor import FeatureStore
from extractor.upkeep.verify import verify

KILLS = max(int(os.environ.get("EXTRACTOR_TEST_KILLS", "3")) // 4, 3)  # each costs seconds
SHARDS, SHARD_IMAGES = 12, 16
END_SECONDS = 500.0  # some on a quiet machine
GRACE_SECONDS = 20.0  # five on a quiet machine

# The network averages pixels, and takes its time. Where a picture is white, it does what the
# environment says: before the row is computed, so that the shard is never finished.
MODEL = """
import os, sys, time
import torch

IS_WORKER = "worker_process" in " ".join(sys.orig_argv)


class Mean(torch.nn.Module):
    def forward(self, pixels):
        time.sleep(float(os.environ.get("SLOW", 0)))
        if (pixels.amin(dim=(1, 2, 3)) > 2).any():
            exec(os.environ.get("ON_WHITE", ""))
        return pixels.mean(dim=(2, 3))


def build():
    if IS_WORKER:
        exec(os.environ.get("IN_WORKER", ""))
    return Mean()
"""


def make_images(home: Path) -> Path:
    """Make a folder with images of several shards; one cannot be decoded."""
    folder = home / "data" / "in"
    folder.mkdir(parents=True)
    for index in range(SHARDS * SHARD_IMAGES - 3):
        noise(index, 40, 30).save(folder / f"{index:03d}.png")
    (folder / "077.png").write_text("no image")
    return folder


class Command:
    """The command ``extract`` on a folder, and where it writes.

    Args:
        images: Folder of images.
        out: Store.
    """

    def __init__(self, images: Path, out: Path) -> None:
        self.images = images
        self.out = out
        model = images.with_name("network.py")
        model.write_text(MODEL)
        sizes = ["-b", "4", "--shard-images", str(SHARD_IMAGES), "--image-size", "32"]
        fixed = ["--precision", "float32", "--threads", "1", "--workers", "1", "--device", "cpu"]
        where = ["--quiet", str(images), "-o", str(out)]
        self._words = ["-m", "extractor", "-m", f"{model}:build", *sizes, *fixed, *where]

    def start(self, processes: int = 2, **env: str) -> WarmProcess:
        """Start the command."""
        words = [*self._words, "--processes", str(processes)]
        return WarmProcess(words, env={**os.environ, **env})

    def run(self, processes: int = 2, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        words = [*self._words, "--processes", str(processes)]
        done = run_python(*words, env={**os.environ, **env}, timeout_seconds=END_SECONDS)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def complete(self) -> None:
        """Run the command without processes, which goes on where the run before it ended."""
        done = run_python(*self._words)
        assert done.returncode == 3, done.stderr

    def finished(self) -> dict[str, int]:
        """File of each finished shard: its name and its inode, which a rename keeps."""
        folders = (self.out / ".extractor-partial" / "features", self.out / "features")
        return {
            path.name: path.stat().st_ino for folder in folders for path in folder.glob("*.npy")
        }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("all"))


@pytest.fixture(scope="module")
def expected(images: Path) -> dict[str, object]:
    """Content of the store that one process makes."""
    command = Command(images, images.with_name("expected"))
    command.complete()
    return content(command.out)


@pytest.fixture
def command(images: Path, tmp_path: Path) -> Command:
    return Command(images, tmp_path / "out")


def workers_of(driver: int) -> list[int]:
    """Processes of the workers of a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(state[1]) == driver and b"worker_process" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return sorted(found)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(is_true: Callable[[], bool], run: WarmProcess) -> None:
    """Wait for a state of a run that goes on."""
    until = time.monotonic() + END_SECONDS
    while not is_true():
        assert time.monotonic() < until, "still false"
        assert run.poll() is None, run.errors()
        time.sleep(0.01)


def all_end(pids: Sequence[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    return not any(map(is_alive, pids))


@pytest.mark.parametrize("processes", [2, pytest.param(14, marks=pytest.mark.slow)])
def test_any_number_of_processes_makes_the_same_store(
    command: Command, expected: dict[str, object], processes: int
) -> None:
    done = command.run(processes)
    assert done.returncode == 3, done.stderr
    assert content(command.out) == expected
    assert list(verify(command.out)) == []
    assert not (command.out / ".extractor-partial").exists()


@pytest.mark.slow
def test_killed_workers_cost_no_finished_shard_and_no_second_start(
    command: Command, expected: dict[str, object]
) -> None:
    rng = random.Random(6)
    killed = 0
    finished: dict[str, int] = {}
    while killed < KILLS:
        shutil.rmtree(command.out, ignore_errors=True)
        finished.clear()
        with command.start(SLOW="0.25") as run:
            while run.poll() is None and killed < KILLS:
                workers = workers_of(run.pid)
                finished |= command.finished()
                if len(workers) == 2 and finished and rng.random() < 0.05:
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    killed += 1
                time.sleep(0.05)
            assert run.wait(END_SECONDS) == 3, run.errors()
        assert "Traceback" not in run.errors()
        assert command.finished() == command.finished() | finished
        assert content(command.out) == expected
    assert list(verify(command.out)) == []


@pytest.mark.slow
@pytest.mark.usefixtures("expected")
def test_image_that_crashes_its_decoder_is_one_failure(images: Path, tmp_path: Path) -> None:
    undisturbed = FeatureStore.open(images.with_name("expected"))
    images = make_images(tmp_path)
    write_hostile(images / "100.png", f"signal {int(signal.SIGSEGV)}", noise(100, 40, 30))
    command = Command(images, tmp_path / "out")
    done = command.run(PYTHONPATH=hostile_python(tmp_path / "hostile"))
    assert done.returncode == 3, done.stderr
    store = FeatureStore.open(command.out)
    assert {Path(failure["path"]).name: failure["error"] for failure in store.failures} == {
        "077.png": "not-an-image",
        "100.png": "crashed",
    }
    assert len(store) == SHARDS * SHARD_IMAGES - 3 - 2
    np.testing.assert_array_equal(store.features[:], undisturbed[store.paths])
    assert list(verify(command.out)) == []


@pytest.mark.slow
def test_shard_that_kills_three_workers_keeps_the_others(tmp_path: Path) -> None:
    images = make_images(tmp_path)
    Image.new("RGB", (40, 30), (255, 255, 255)).save(images / "050.png")
    command = Command(images, tmp_path / "out")
    failed = command.run(ON_WHITE="os._exit(9)")
    assert failed.returncode == 1
    assert "1 shard of 12 failed several times (shard 3: exit code 9)" in failed.stderr
    assert not (command.out / "store.json").exists()
    finished = command.finished()
    assert sorted(finished) == [f"{shard:05d}.npy" for shard in range(SHARDS) if shard != 3]
    command.complete()
    assert command.finished().items() >= finished.items()
    assert len(FeatureStore.open(command.out)) == SHARDS * SHARD_IMAGES - 3 - 1
    assert list(verify(command.out)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        (signal.SIGUSR1, 143),
    ],
)
def test_signal_to_the_driver_ends_its_workers(
    command: Command, expected: dict[str, object], number: signal.Signals, code: int
) -> None:
    with command.start(SLOW="0.25") as run:
        wait_until(lambda: len(command.finished()) > 2, run)
        workers = workers_of(run.pid)
        assert len(workers) == 2
        run.send_signal(number)
        if number == signal.SIGINT:  # a terminal sends it to all of them
            for worker in workers:
                os.kill(worker, number)
        assert run.wait(GRACE_SECONDS) == code, run.errors()
        assert all_end(workers, GRACE_SECONDS if number == signal.SIGKILL else 0.2)
    assert "Traceback" not in run.errors()
    assert run.errors().count("Run the same command to resume") == (number != signal.SIGKILL)
    finished = command.finished()
    command.complete()
    assert command.finished().items() >= finished.items()
    assert content(command.out) == expected


@pytest.mark.slow
def test_workers_that_import_torch_end_with_their_driver(command: Command) -> None:
    with command.start() as run:
        wait_until(lambda: len(workers_of(run.pid)) == 2, run)
        workers = workers_of(run.pid)
        run.send_signal(signal.SIGTERM)
        assert run.wait(GRACE_SECONDS) == 143
        assert all_end(workers, GRACE_SECONDS)
    assert "Traceback" not in run.errors()


@pytest.mark.slow
def test_run_goes_on_after_it_was_suspended(command: Command, expected: dict[str, object]) -> None:
    with command.start(SLOW="0.1") as run:
        wait_until(lambda: len(command.finished()) > 1, run)
        stopped = [run.pid, *workers_of(run.pid)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        assert run.wait(END_SECONDS) == 3, run.errors()
    assert content(command.out) == expected
    assert "worker" not in run.errors()


@pytest.mark.slow
def test_worker_that_cannot_load_ends_the_run_with_its_reason(command: Command) -> None:
    failed = command.run(IN_WORKER="raise RuntimeError('no such device here')")
    assert failed.returncode == 1
    assert "no such device here" in failed.stderr
    assert not (command.out / "store.json").exists()
    command.complete()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Separate file system with little room."""
    with small_disk_at(tmp_path / "disk", "2m") as disk:
        yield disk


@pytest.mark.slow
def test_full_disk_in_a_worker_ends_the_run_with_that_reason(
    images: Path, small_disk: Path
) -> None:
    command = Command(images, small_disk / "out")
    # Fills the disk once the worker has begun, so that the driver has seen enough of it.
    fill = f"open({str(small_disk / 'filler')!r}, 'wb').write(bytes(2 * 2**20))"
    failed = command.run(IN_WORKER=f"try:\n    {fill}\nexcept OSError:\n    pass")
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    assert not (command.out / "store.json").exists()
    (small_disk / "filler").unlink()
    command.complete()
    assert list(verify(command.out)) == []


def test_workers_take_neither_modules_nor_digests_from_the_folder_of_a_script(
    tmp_path: Path,
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "network.py").write_text(MODEL)
    (code / "queue.py").write_text("raise RuntimeError('not for workers')")
    (code / "settings.py").write_text("PROCESSES = 2")
    noise(1, 40, 30).save(tmp_path / "1.png")
    script = """
import sys
import extractor.api
sys.path.insert(0, "code")
import settings
sys.path.remove("code")
extractor.extract("1.png", "code/network.py:build", "out", device="cpu", threads=1,
    precision="float32", image_size=32, processes=settings.PROCESSES)
"""
    done = run_python("-c", script, cwd=tmp_path, timeout_seconds=END_SECONDS)
    assert done.returncode == 0, done.stderr
    assert len(FeatureStore.open(tmp_path / "out")) == 1
