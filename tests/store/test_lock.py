"""Only one run at a time writes a store, and the lock never outlives its process."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import extractor.store.lock as lock_module
from extractor.errors import StoreError
from extractor.reading.reader import FeatureStore
from extractor.store.claim import ClaimedFolder, SharedFolder
from extractor.store.format import PLAN
from extractor.store.lock import Lock
from extractor.store.writer import StoreRun

HOLD = """
import sys
from pathlib import Path
from extractor.store.claim import ClaimedFolder

with ClaimedFolder(Path(sys.argv[1]), overwrite=True):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_writer(out: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_second_run_fails_at_once_and_names_the_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another_writer(out) as holder:
        begin = time.monotonic()
        with pytest.raises(
            StoreError, match=rf"out is being written by process {holder.pid} on .*another --out"
        ):
            ClaimedFolder(out).__enter__()
        assert time.monotonic() - begin < 2
        # The one who was refused has taken nothing away.
        assert (out / ".extractor-partial" / "lock").is_file()
        with pytest.raises(StoreError, match=f"process {holder.pid} on"):
            ClaimedFolder(out, overwrite=True).__enter__()


def test_killed_process_releases_the_lock(
    tmp_path: Path,
    parts: list[np.ndarray],
    write_store: Callable[..., Path],
) -> None:
    out = write_store(tmp_path / "out", parts[:1])
    with another_writer(out) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (out / ".extractor-partial" / "lock").is_file()
        write_store(out, parts, overwrite=True)
    assert len(FeatureStore.open(out)) == 7
    assert not (out / ".extractor-partial").exists()


def test_finished_process_releases_the_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another_writer(out) as holder:
        holder.communicate()
    assert not out.exists()
    with ClaimedFolder(out):
        assert out.exists()


def test_leaving_a_published_store_does_not_touch_the_next_run(
    tmp_path: Path, parts: list[np.ndarray], fill: Callable[..., StoreRun]
) -> None:
    out = tmp_path / "out"
    with ClaimedFolder(out) as first:
        fill(first, parts).publish()
        second = ClaimedFolder(out, overwrite=True)
        with second:
            run = fill(second, parts[:1])
            first.__exit__()
            assert (out / ".extractor-partial" / "lock").is_file()
            run.publish()
    assert len(FeatureStore.open(out)) == 4


def test_two_runs_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ClaimedFolder(out):
        with pytest.raises(StoreError, match=f"being written by process {os.getpid()} on"):
            ClaimedFolder(out).__enter__()
        with pytest.raises(StoreError, match=f"being written by process {os.getpid()} on"):
            ClaimedFolder(out).__enter__()


def test_lock_without_text_still_holds(tmp_path: Path) -> None:
    path = tmp_path / "out" / "staging" / "lock"
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="out is being written by another process"):
            Lock(path).__enter__()


def test_lock_is_free_after_exit(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for _ in range(2):
        with Lock(path), pytest.raises(StoreError, match=f"process {os.getpid()} on"):
            Lock(path).__enter__()


def test_lock_text_replaces_a_longer_text(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("x" * 500)
    with Lock(path):
        text = path.read_text()
    assert text.startswith(f"process {os.getpid()} on ")
    assert "x" * 400 not in text


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made anew"])
def test_lock_file_removed_before_locking_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    path = tmp_path / "lock"
    flock = fcntl.flock
    calls = []

    def late(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:  # its last holder leaves just now
            path.unlink()
            if again:
                path.touch()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with Lock(path):
        assert len(calls) == 2
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(StoreError, match=f"process {os.getpid()} on"):
            Lock(path).__enter__()


def test_failed_lock_leaks_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def opened() -> int:
        descriptor = os.open(os.devnull, os.O_RDONLY)  # the lowest that is free
        os.close(descriptor)
        return descriptor

    with Lock(path):
        before = opened()
        for _ in range(3):
            with pytest.raises(StoreError, match="being written"):
                Lock(path).__enter__()
        assert opened() == before


def test_check_does_not_take_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "staging" / "lock"
    Lock(path).check()  # there is none
    path.parent.mkdir()
    with Lock(path):
        said = path.read_text()
        with pytest.raises(StoreError, match=rf"being written by process {os.getpid()} on"):
            Lock(path).check()
        assert path.read_text() == said
    Lock(path).check()
    with Lock(path):
        pass


def test_shared_lock_admits_others_that_share_it_and_no_run(tmp_path: Path) -> None:
    path = tmp_path / "out" / "staging" / "lock"
    with pytest.raises(FileNotFoundError, match="lock"):
        Lock(path, shared=True).__enter__()
    path.parent.mkdir(parents=True)
    path.touch()
    refused = pytest.raises(StoreError, match=f"being written by process {os.getpid()} on")
    with Lock(path, shared=True), Lock(path, shared=True), refused:
        Lock(path).__enter__()
    with Lock(path), pytest.raises(StoreError, match=f"process {os.getpid()} on"):
        Lock(path, shared=True).__enter__()


def test_waiting_lock_takes_over_and_says_why_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock_module, "TELL_SECONDS", 0.0)
    path = tmp_path / "out" / "staging" / "lock"
    path.parent.mkdir(parents=True)
    first = Lock(path)
    first.__enter__()
    threading.Timer(0.3, first.__exit__).start()
    begin = time.monotonic()
    with Lock(path, waits=True):
        assert time.monotonic() - begin >= 0.2
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting: {tmp_path / 'out'} is being written by process {os.getpid()} on "
        f"{socket.gethostname()}"
    ]


def test_shared_folder_without_a_run_is_shared_as_it_is(tmp_path: Path) -> None:
    with SharedFolder(tmp_path / "out") as folder:
        assert folder.staged_job() is None
    assert not (tmp_path / "out").exists()


def test_leaving_a_shared_folder_clears_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ClaimedFolder(out) as claim:
        claim.start_staging()
        (claim.staging / PLAN).write_text("{}")
        claim.keep_work()
    for _ in range(2):
        refused = pytest.raises(StoreError, match="being written by")
        with SharedFolder(out), SharedFolder(out) as folder, refused:
            ClaimedFolder(out).__enter__()
        assert (folder.staging / PLAN).exists()
    with ClaimedFolder(out, waits=True) as claim:
        assert (claim.staging / PLAN).exists()
