"""The gate lets as many threads decode as no computation needs cores."""

from __future__ import annotations

import threading
import time

import pytest

from extractor.loading import gate as module
from extractor.loading.gate import Gate


@pytest.fixture
def gate() -> Gate:
    lock = threading.Lock()
    return Gate(3, threading.Condition(lock), threading.Condition(lock))


def test_gate_is_open_for_as_many_images_as_workers(gate: Gate) -> None:
    for _ in range(3):
        assert gate.is_open
        gate.enter()
    assert not gate.is_open
    gate.leave()
    assert gate.is_open


@pytest.mark.parametrize(("cores", "open_for"), [(0, 3), (1, 2), (3, 0), (9, 0)])
def test_computation_closes_the_gate_for_its_cores(gate: Gate, cores: int, open_for: int) -> None:
    entered = 0
    with gate.resting(cores):
        while gate.is_open:
            gate.enter()
            entered += 1
        assert entered == open_for
    for _ in range(entered):
        gate.leave()
    assert gate.is_open


def test_computation_waits_for_the_last_images(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAIT_SECONDS", 30)
    gate.enter()

    def finish() -> None:
        time.sleep(0.05)
        with gate._left:
            gate.leave()

    thread = threading.Thread(target=finish)
    thread.start()
    with gate.resting(3):
        assert gate.is_quiet
    thread.join()


def test_computation_does_not_wait_long_for_a_slow_image(gate: Gate) -> None:
    gate.enter()
    started = time.monotonic()
    with gate.resting(3):
        assert not gate.is_quiet
        assert module.MAX_WAIT_SECONDS <= time.monotonic() - started < 10
