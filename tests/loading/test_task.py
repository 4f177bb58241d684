"""A task writes to its own row, and its clock stands still while it waits for others."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support.loading import buffers, make_batch, read_file_of

from extractor.images.budget import LargeImageSlot, PixelBudget
from extractor.images.types import ImageInfo
from extractor.loading.task import Task, TaskBudget

INFO = ImageInfo(-1, -1, 5, 5)


def test_outs_are_the_rows_of_the_image() -> None:
    batch = make_batch(images=2)
    Task(batch, 1).outs[0][...] = 9
    assert (batch.rows[0][1] == 9).all()
    assert (batch.rows[0][0] == 201).all()


def test_settling_copies_the_row_if_the_batch_moved() -> None:
    batch = make_batch(images=2)
    task = Task(batch, 0)
    batch.move_to(buffers(4, level=0))
    task.outs[0][...] = 9
    task.settle(INFO)
    assert (batch.rows[0][0] == 9).all()
    assert batch.outcomes[0] == INFO


def test_clock_restarts_after_a_pause() -> None:
    task = Task(make_batch(), 0)
    task.started = 0.0
    with task.paused():
        assert task.started == math.inf
    assert 0.0 < task.started <= time.monotonic()


def test_file_status_comes_from_the_content_the_path_or_neither(tmp_path: Path) -> None:
    task = Task(make_batch(), 0)
    assert task.file_status() == (-1, -1)
    task.origin = str(tmp_path / "a.jpg")
    assert task.file_status() == (-1, -1)
    (tmp_path / "a.jpg").write_bytes(b"abc")
    assert task.file_status() == (3, (tmp_path / "a.jpg").stat().st_mtime_ns)
    task.source = read_file_of(12)
    assert task.file_status() == (12, 1)
    assert task.bytes_read == 12


def test_waiting_for_pixels_stops_the_clock() -> None:
    shared = PixelBudget(25)
    task = Task(make_batch(), 0)
    shared.take(20)
    thread = threading.Thread(target=TaskBudget(shared, task).take, args=(10,))
    thread.start()
    deadline = time.monotonic() + 10
    while task.started != math.inf and time.monotonic() < deadline:
        time.sleep(0.001)
    assert task.started == math.inf
    shared.give_back(20)
    thread.join(10)
    assert task.started < math.inf
    assert task.claims == [10]


def test_waiting_for_the_slot_of_large_images_stops_the_clock(tmp_path: Path) -> None:
    other = LargeImageSlot(tmp_path / "slot")
    other.take()
    shared = PixelBudget(100, 20, LargeImageSlot(tmp_path / "slot"))
    task = Task(make_batch(), 0)
    thread = threading.Thread(target=TaskBudget(shared, task).take, args=(30,))
    thread.start()
    deadline = time.monotonic() + 10
    while task.started != math.inf and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert task.started == math.inf
    other.give_back()
    thread.join(10)
    assert task.started < math.inf
    assert task.claims == [30]


@pytest.mark.parametrize("is_abandoned", [False, True])
def test_pixels_of_an_abandoned_task_are_given_back_once(is_abandoned: bool) -> None:
    shared = PixelBudget(25)
    task = Task(make_batch(), 0)
    budget = TaskBudget(shared, task)
    budget.take(10)
    if is_abandoned:  # the loader gives them back, and the thread comes back later
        task.is_abandoned = True
        TaskBudget(shared, task).give_back_all()
    budget.give_back(10)
    assert shared._left == 25


def test_pixels_taken_after_a_task_was_abandoned_are_given_back() -> None:
    shared = PixelBudget(25)
    task = Task(make_batch(), 0)
    task.is_abandoned = True
    with TaskBudget(shared, task).claim(5, 2):
        assert shared._left == 15
    assert shared._left == 25


@pytest.mark.parametrize("comes_back", [False, True])
def test_abandoned_task_frees_the_slot_of_large_images(tmp_path: Path, comes_back: bool) -> None:
    shared = PixelBudget(100, 20, LargeImageSlot(tmp_path / "slot"))
    task = Task(make_batch(), 0)
    budget = TaskBudget(shared, task)
    budget.take(30)
    task.is_abandoned = True
    budget.give_back_all()
    if comes_back:
        budget.give_back(30)
    assert shared._left == 20
    other = PixelBudget(100, 20, LargeImageSlot(tmp_path / "slot"))
    with other.claim(6, 5), shared.claim(5, 2):
        if comes_back:
            budget.give_back(30)
        assert (other._left, shared._left) == (0, 10)


def test_outs_share_memory_with_the_batch() -> None:
    batch = make_batch()
    assert np.shares_memory(Task(batch, 0).outs[0], batch.rows[0])
