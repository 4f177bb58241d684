"""Time limit of images: which of them are late, and how many were abandoned."""

from __future__ import annotations

from collections.abc import Iterator

from extractor.errors import SourceError
from extractor.loading.task import Task
from extractor.system.running_clock import running_seconds

__all__ = ["MAX_ABANDONED", "Watchdog"]

# Each hanging decoder keeps a thread and a buffer. So many of them mean that the disk hangs.
MAX_ABANDONED = 32


class Watchdog:
    """Keeps the images that threads are working on, and finds the late ones.

    The caller holds the loader's lock.

    Args:
        timeout_seconds: Time limit of one image.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._running: set[Task] = set()
        self._abandoned = 0

    def watch(self, task: Task) -> None:
        """Watch a task until it is forgotten or late."""
        self._running.add(task)

    def forget(self, task: Task) -> None:
        """Stop watching a task."""
        self._running.discard(task)

    @property
    def is_reading_ahead(self) -> bool:
        """Whether a reading thread works on an image."""
        return any(task.is_read_ahead for task in self._running)

    def seconds_until_late(self) -> float:
        """Return the time after which the oldest image may be late."""
        now = running_seconds()
        oldest = min([now, *(task.started for task in self._running)])
        return max(oldest + self._timeout - now, 0.0) + 0.001

    def abandon_late(self) -> Iterator[Task]:
        """Yield the late tasks, each marked as abandoned.

        Raises:
            SourceError: So many images were late that the disk must be the reason.
        """
        now = running_seconds()
        late = [task for task in self._running if now - task.started >= self._timeout]
        for task in late:
            self._running.discard(task)
            task.is_abandoned = True
            self._abandoned += 1
            if self._abandoned > MAX_ABANDONED:
                raise SourceError(
                    f"{self._abandoned} images were not read and decoded within "
                    f"{self._timeout:g} s each; check that their disk responds, or raise "
                    "--image-timeout"
                )
            yield task
