"""Images in the order of the plan, and the batches that are being decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from extractor.images.types import ImageSource
from extractor.loading.batch import Batch, BatchOwner
from extractor.loading.buffers import BufferPool
from extractor.loading.task import Task

__all__ = ["TaskQueue"]


class TaskQueue:
    """Hands out images in the order of the plan, and batches in the same order.

    A batch is opened when an image of it is wanted and a buffer is free. The caller holds the
    loader's lock.

    Args:
        plan: Images of each batch; read lazily.
        batch_size: Largest number of images in a batch.
        buffers: Memory for the batches.
        owner: Owner of the batches.
        on_exhausted: Called once, when the plan has no more batches.

    Attributes:
        is_exhausted: Whether the plan has no more batches.
    """

    def __init__(
        self,
        plan: Iterator[Sequence[ImageSource]],
        batch_size: int,
        buffers: BufferPool,
        owner: BatchOwner,
        on_exhausted: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._batch_size = batch_size
        self._buffers = buffers
        self._owner = owner
        self._on_exhausted = on_exhausted
        self._open: deque[Batch] = deque()
        self._has_failed = False
        self.is_exhausted = False

    @property
    def has_unclaimed(self) -> bool:
        """Whether an open batch has an image that no thread has claimed."""
        return bool(self._open) and self._open[-1].has_unclaimed

    def prepare_next(self) -> bool:
        """Open the next batch if it is needed and fits. Return whether an image can be claimed.

        Raises:
            Exception: The plan raised it. There are no further batches then, and no end either.
        """
        while not self.has_unclaimed:
            if self.is_exhausted or self._has_failed or not len(self._buffers):
                return False
            self._open_batch()
        return True

    def claim(self) -> Task:
        """Return the next image. :meth:`prepare_next` returned True before."""
        batch = self._open[-1]
        return Task(batch, batch.claim())

    @property
    def is_first_decided(self) -> bool:
        """Whether the first batch is complete, or there will be none."""
        return self._open[0].is_complete if self._open else self.is_exhausted

    def pop_first(self) -> Batch | None:
        """Remove and return the first batch, or None at the end of the plan."""
        return self._open.popleft() if self._open else None

    def _open_batch(self) -> None:
        # A generator that has raised ends when it is asked again. Another thread may ask before the
        # error is known, and would take the plan for complete.
        self._has_failed = True
        sources = next(self._plan, None)
        if sources is None:
            self.is_exhausted = True
            self._on_exhausted()
            return
        if not 0 < len(sources) <= self._batch_size:
            raise ValueError(f"a batch of {len(sources)} images, expected 1 to {self._batch_size}")
        self._has_failed = False
        self._open.append(Batch(self._buffers.take(), sources, self._owner))
