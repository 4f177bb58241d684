"""Gate before the decoder: how many threads may decode while others compute."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["Gate"]

# Time that a computation waits for decoding threads to leave their cores.
MAX_WAIT_SECONDS = 0.005


class Gate:
    """Limits the number of images that are decoded at the same time.

    A computation closes the gate for as many threads as it needs cores. The caller holds the
    loader's lock, except for :meth:`resting`.

    Args:
        workers: Number of decoding threads.
        left: Notified when a thread leaves the gate while others rest. Has the loader's lock.
        opened: Notified when the gate opens. Has the loader's lock.
    """

    def __init__(
        self, workers: int, left: threading.Condition, opened: threading.Condition
    ) -> None:
        self._workers = workers
        self._left = left
        self._opened = opened
        self._decoding = 0
        self._resting = 0

    @property
    def is_open(self) -> bool:
        """Whether one more image may be decoded."""
        return self._decoding < self._workers - self._resting

    @property
    def is_quiet(self) -> bool:
        """Whether the threads that should rest do so."""
        return self._decoding <= max(self._workers - self._resting, 0)

    def enter(self) -> None:
        """Count an image that is being decoded."""
        self._decoding += 1

    def leave(self) -> None:
        """Count an image that is no longer being decoded."""
        self._decoding -= 1
        if self._resting:
            self._left.notify_all()

    @contextlib.contextmanager
    def resting(self, cores: int) -> Iterator[None]:
        """Let as many threads rest during the block, after their current images."""
        with self._left:
            self._resting += cores
        try:
            with self._left:
                # Computing beside the last decoders costs more than waiting a little for them.
                self._left.wait_for(lambda: self.is_quiet, MAX_WAIT_SECONDS)
            yield
        finally:
            with self._left:
                self._resting -= cores
                self._opened.notify_all()
