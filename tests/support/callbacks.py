"""Callbacks of ``extract()`` for tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from extractor.report import Progress

# Calls of `stop` before the first batch: when listing, loading, tuning and computing begin.
EARLY_CALLS = 4


def stop_after(batches: int) -> Callable[[], bool]:
    """Return a ``stop`` callback that is true once this many batches are computed."""
    asked = itertools.count(1)
    return lambda: next(asked) >= EARLY_CALLS + batches


def computed(updates: Iterable[Progress]) -> list[int]:
    """Return how many images were done in each call of ``progress`` while rows were computed."""
    return [progress.done for progress in updates if progress.phase == "computing"]
