"""Reading threads are started for slow disks only, and the bytes that wait are bounded."""

from __future__ import annotations

import pytest
from support.loading import make_batch, read_file_of

from extractor.loading import read_ahead
from extractor.loading.read_ahead import MAX_READERS, OBSERVED_IMAGES, ReadAhead
from extractor.loading.task import Task


def after_images(workers: int = 2) -> ReadAhead:
    ahead = ReadAhead(workers)
    looks = [ahead.count_image() for _ in range(OBSERVED_IMAGES)]
    assert looks == [False] * (OBSERVED_IMAGES - 1) + [True]
    return ahead


def read_task(size: int) -> Task:
    task = Task(make_batch(), 0)
    task.source = read_file_of(size)
    return task


@pytest.mark.parametrize(
    ("read", "decode", "lock", "readers"),
    [  # seconds per image; two workers
        (0.002, 0.001, 0, 0),  # fast, though slower than decoding
        (0.004, 0.010, 0, 0),  # under half of the time to decode
        (0.006, 0.010, 0, 2),  # ceil(2 * 0.6)
        (0.040, 0.010, 0, 8),
        (0.040, 0.010, 0.003, 8),
        (0.040, 0.010, 0.005, 0),  # the lock is slow, not the disk
        (9.000, 0.010, 0.005, MAX_READERS),
        (9.000, 0.000, 0, MAX_READERS),
    ],
)
def test_slow_disks_get_as_many_readers_as_they_need(
    read: float, decode: float, lock: float, readers: int
) -> None:
    ahead = after_images()
    seconds = read * OBSERVED_IMAGES, decode * OBSERVED_IMAGES, lock
    assert ahead.missing_readers(*seconds) == readers
    assert ahead.readers == readers
    assert ahead.missing_readers(*seconds) == 0  # they count as started


def test_files_leave_in_the_order_of_their_coming() -> None:
    ahead = ReadAhead(1)
    tasks = [read_task(size) for size in (1, 2, 3)]
    for task in tasks:
        ahead.push(task)
    assert [ahead.pop() for _ in tasks] == tasks
    assert not ahead


def test_readers_wait_while_too_many_bytes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MAX_AHEAD_BYTES", 100)
    ahead = ReadAhead(1)
    ahead.push(read_task(60))
    assert not ahead.is_full
    ahead.push(read_task(40))
    assert ahead.is_full
    ahead.pop()
    assert not ahead.is_full
