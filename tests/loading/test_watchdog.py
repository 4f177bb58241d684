"""Late images are found by their own clock, and too many of them are an error."""

from __future__ import annotations

import math
import time

import pytest
from support.loading import make_batch

from extractor.errors import SourceError
from extractor.loading.task import Task
from extractor.loading.watchdog import MAX_ABANDONED, Watchdog
from extractor.system import running_clock
from extractor.system.running_clock import running_seconds


def watched(watchdog: Watchdog, age_seconds: float) -> Task:
    task = Task(make_batch(), 0)
    task.started = running_seconds() - age_seconds
    watchdog.watch(task)
    return task


def test_only_late_tasks_are_abandoned_and_only_once() -> None:
    watchdog = Watchdog(10)
    late, early = watched(watchdog, 11), watched(watchdog, 1)
    assert list(watchdog.abandon_late()) == [late]
    assert late.is_abandoned
    assert not early.is_abandoned
    assert list(watchdog.abandon_late()) == []


def test_forgotten_and_paused_tasks_are_never_late() -> None:
    watchdog = Watchdog(10)
    watchdog.forget(watched(watchdog, 11))
    watched(watchdog, -math.inf)
    assert list(watchdog.abandon_late()) == []


def test_oldest_task_decides_how_long_to_wait() -> None:
    watchdog = Watchdog(10)
    assert watchdog.seconds_until_late() == pytest.approx(10, abs=0.1)
    watched(watchdog, 2)
    watched(watchdog, 7)
    assert watchdog.seconds_until_late() == pytest.approx(3, abs=0.1)
    watched(watchdog, 20)
    assert 0 < watchdog.seconds_until_late() < 0.1


def test_too_many_late_images_are_an_error_of_the_disk() -> None:
    watchdog = Watchdog(0.5)
    for _ in range(MAX_ABANDONED):
        watched(watchdog, 1)
    assert len(list(watchdog.abandon_late())) == MAX_ABANDONED
    watched(watchdog, 1)
    with pytest.raises(
        SourceError, match=r"33 images .* within 0\.5 s each; check that their disk"
    ):
        list(watchdog.abandon_late())


def test_time_in_which_the_process_is_stopped_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running_clock, "_clock", running_clock._RunningClock())
    watchdog = Watchdog(10)
    task = watched(watchdog, 5)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    assert list(watchdog.abandon_late()) == []
    assert watchdog.seconds_until_late() == pytest.approx(4, abs=0.2)
    for step in range(10):
        monkeypatch.setattr(time, "monotonic", lambda step=step: now + 3600 + step / 2)
        late = list(watchdog.abandon_late())
        assert late == ([task] if step >= 8 else [])
        if late:
            break


def test_reading_tasks_are_told_from_decoding_ones() -> None:
    watchdog = Watchdog(10)
    task = watched(watchdog, 0)
    assert not watchdog.is_reading_ahead
    task.is_read_ahead = True
    assert watchdog.is_reading_ahead
