"""The clock counts the time during which the process can run, and no stop."""

from __future__ import annotations

import time

import pytest

from extractor.system import running_clock
from extractor.system.running_clock import LOOK_SECONDS, MAX_GAP_SECONDS, running_seconds


def test_short_gaps_count_in_full_and_long_ones_hardly(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(running_clock, "_clock", running_clock._RunningClock())
    monkeypatch.setattr(time, "monotonic", lambda: now)
    start = running_seconds()
    expected = 0.0
    for gap in (0.0, LOOK_SECONDS, 0.5, MAX_GAP_SECONDS, 4.0, 0.5, 86_400.0, LOOK_SECONDS):
        now += gap
        expected += min(gap, 1.0)
        assert running_seconds() - start == pytest.approx(expected)


def test_a_thread_that_waits_looks_often_enough() -> None:
    assert LOOK_SECONDS <= MAX_GAP_SECONDS / 3
