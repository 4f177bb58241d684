"""Stores on disks that misbehave."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from support.networks import mean_pixel

from extractor import extract
from extractor.errors import StoreError
from extractor.store import atomic, journal
from extractor.store.lock import Lock


def test_disk_that_fills_up_loses_no_rows(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(photos, mean_pixel(), tmp_path / "expected", batch_size=2)
    out = tmp_path / "out"
    calls = iter(range(1000))
    append = journal.Journal.append

    def full(self: journal.Journal, *arguments: object) -> None:
        if next(calls) == 3:
            raise OSError(28, os.strerror(28))
        append(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(journal.Journal, "append", full)
    with pytest.raises(StoreError, match=r"No space left on device.*nothing .* is lost"):
        extract(photos, mean_pixel(), out, batch_size=2)
    report = extract(photos, mean_pixel(), out, batch_size=2)
    assert report.resumed == 6
    expected = (tmp_path / "expected/features/00000.npy").read_bytes()
    assert (out / "features/00000.npy").read_bytes() == expected


def test_file_system_without_locks_needs_no_lock(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StoreError, match=r"does not support locks.*--no-lock"):
        extract(photos, mean_pixel(), tmp_path / "out")
    assert extract(photos, mean_pixel(), tmp_path / "out", lock=False).rows == 11
    with pytest.raises(StoreError, match="does not support locks"):
        Lock(tmp_path / "lock").__enter__()


def test_file_system_without_fsync_is_warned_about(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(22, os.strerror(22))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic._warn_about_sync.cache_clear()
    assert extract(photos, mean_pixel(), tmp_path / "out").rows == 11
    assert len([r for r in caplog.records if "a power cut may cost data" in r.message]) == 1
