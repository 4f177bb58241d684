"""Fixtures for images."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def fail_if_stuck() -> Iterator[None]:
    """Fail a test that blocks, for example on a pipe."""

    def fail(*_: object) -> None:
        pytest.fail("still waiting after 10 seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
