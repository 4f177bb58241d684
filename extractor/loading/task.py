"""One image on its way through the threads, and its share of the pixel budget."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

from extractor.images.budget import PixelBudget
from extractor.images.files import size_and_mtime
from extractor.images.types import EncodedJpeg, Failure, ImageInfo, ImageSource, ReadFile
from extractor.loading.batch import Batch
from extractor.system.running_clock import running_seconds

__all__ = ["Task", "TaskBudget"]


class Task:
    """One image while a thread reads or decodes it.

    Args:
        batch: Batch that the image belongs to.
        index: Position of the image in its batch.

    Attributes:
        origin: The image as the plan names it.
        source: The image to decode: ``origin``, or its content after it was read.
        outs: Rows to write the pictures to.
        encoded: The image if it is left for the GPU to decode.
        claims: Pixels that it holds of the budget, one number for each claim.
        started: Start of the time limit, by ``running_seconds()``; infinite while it is paused.
        is_abandoned: Whether it took too long, and its thread is left to itself.
        is_read_ahead: Whether a reading thread holds it.
    """

    def __init__(self, batch: Batch, index: int) -> None:
        self.batch = batch
        self.index = index
        self.origin = batch.sources[index]
        self.source: ImageSource = self.origin
        self.outs = [rows[index] for rows in batch.rows]
        self.encoded: EncodedJpeg | None = None
        self.claims: list[int] = []
        self.started = running_seconds()
        self.is_abandoned = False
        self.is_read_ahead = False
        self._rows = batch.rows

    @property
    def bytes_read(self) -> int:
        """Size of the content, 0 if it was not read."""
        return len(self.source.content) if isinstance(self.source, ReadFile) else 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock during the block, and restart the time limit after it."""
        self.started = math.inf
        try:
            yield
        finally:
            self.started = running_seconds()

    def settle(self, outcome: ImageInfo | Failure) -> None:
        """Record the outcome in the batch. Copy the rows if the batch moved meanwhile."""
        if self._rows is not self.batch.rows:
            for out, rows in zip(self.outs, self.batch.rows, strict=True):
                rows[self.index] = out
        self.batch.settle(self.index, outcome, self.encoded)

    def file_status(self) -> tuple[int, int]:
        """Return size and modification time of the file, (-1, -1) if there is none."""
        if isinstance(self.source, ReadFile):
            return self.source.size, self.source.mtime_ns
        if isinstance(self.origin, (str, bytes, os.PathLike)):
            with contextlib.suppress(OSError, ValueError):
                return size_and_mtime(os.stat(self.origin))
        return -1, -1


class TaskBudget(PixelBudget):
    """The shared pixel budget as one task sees it: waiting for pixels stops its clock.

    Args:
        shared: Budget of all threads.
        task: Task that claims the pixels.
    """

    def __init__(self, shared: PixelBudget, task: Task) -> None:
        self.max_pixels = shared.max_pixels
        self._shared = shared
        self._task = task

    def take(self, pixels: int) -> None:
        """Wait until so many pixels are free, and take them."""
        with self._task.paused():
            self._shared.take(pixels)
            self._task.claims.append(pixels)

    def give_back(self, pixels: int) -> None:
        """Free pixels, unless that was done when the task was abandoned."""
        with contextlib.suppress(ValueError):
            self._task.claims.remove(pixels)  # by one thread only: this one, or who abandons it
            self._shared.give_back(pixels)

    def give_back_all(self) -> None:
        """Free all that an abandoned task holds, in another thread than its own."""
        with contextlib.suppress(IndexError):
            while True:
                self._shared.give_back(self._task.claims.pop())
