"""Files that are read before a decoding thread wants them, for slow disks."""

from __future__ import annotations

import math
from collections import deque

from extractor.loading.task import Task

__all__ = ["ReadAhead"]

# Reading threads are started until the decoding threads always find a file. Larger files are left
# to the decoding threads.
MAX_READERS = 32
MAX_FILE_BYTES = 8 * 2**20
MAX_AHEAD_BYTES = 256 * 2**20  # all files that wait to be decoded
SLOW_READ_SECONDS = 0.003
SLOW_READ_SHARE = 0.5  # of the time to decode an image
OBSERVED_IMAGES = 16  # between two looks at the speed of the disk

# Reading a file gives Python's lock away about five times. Where many threads want it, getting it
# back takes longer than the disk, and more threads would make that worse.
LOCK_TURNS = 10


class ReadAhead:
    """Queue of files that were read, and the number of reading threads that the disk needs.

    The caller holds the loader's lock.

    Args:
        workers: Number of decoding threads.

    Attributes:
        readers: Number of reading threads.
    """

    def __init__(self, workers: int) -> None:
        self.readers = 0
        self._workers = workers
        self._settled = 0
        self._files: deque[Task] = deque()
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether the readers must wait."""
        return self._bytes >= MAX_AHEAD_BYTES

    def push(self, task: Task) -> None:
        """Add a task whose file was read."""
        self._files.append(task)
        self._bytes += task.bytes_read

    def __bool__(self) -> bool:
        """Return whether a file waits to be decoded."""
        return bool(self._files)

    def pop(self) -> Task:
        """Remove and return the oldest task."""
        task = self._files.popleft()
        self._bytes -= task.bytes_read
        return task

    def count_image(self) -> bool:
        """Count a finished image. Return whether to call :meth:`missing_readers` now."""
        self._settled += 1
        return self._settled % OBSERVED_IMAGES == 0

    def missing_readers(
        self, read_seconds: float, decode_seconds: float, lock_seconds: float
    ) -> int:
        """Return how many reading threads to start, and count them as started.

        Args:
            read_seconds: Time that reading took so far, over all threads.
            decode_seconds: Time that decoding took so far, over all threads.
            lock_seconds: Usual time to get Python's lock back after giving it away.
        """
        read, decode = read_seconds / self._settled, decode_seconds / self._settled
        if read < max(SLOW_READ_SECONDS, SLOW_READ_SHARE * decode, LOCK_TURNS * lock_seconds):
            return 0
        wanted = min(math.ceil(self._workers * read / max(decode, 1e-6)), MAX_READERS)
        missing = max(wanted - self.readers, 0)
        self.readers += missing
        return missing
