"""Images in order, decoded ahead by threads straight into a few reused batch buffers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from extractor.decode import Failure, ImageInfo, ImageSource, decode_into
from extractor.errors import DecodeError

if TYPE_CHECKING:
    import torch

    from extractor.preprocess import Preprocess

__all__ = ["Batch", "BatchLoader"]

# One buffer is being filled, one is ready, one is on its way to the device, and one is slack for
# an image that takes long. More only costs memory: what bounds a run is a rate, not a queue.
BUFFERS = 4


class Batch:
    """Decoded images of one forward pass, in the order in which they were asked for.

    Attributes:
        pictures: for each preprocessing ``(B, H, W, 3)`` uint8 RGB in host memory, B the fixed
            batch size. Rows of failed images and rows behind the last image are black. Valid until
            :meth:`release`.
        outcomes: for each image what it was, or why it has no pixels; at most B of them.
    """

    def __init__(
        self,
        pictures: tuple[torch.Tensor, ...],
        sources: Sequence[ImageSource],
        owner: BatchLoader,
    ):
        self.pictures = pictures
        self.outcomes: list[ImageInfo | Failure | None] = [None] * len(sources)
        self._sources = sources
        self._rows: list[npt.NDArray[np.uint8]] = [picture.numpy() for picture in pictures]
        for rows in self._rows:
            rows[len(sources) :] = 0
        self._claimed = 0
        self._pending = len(sources)
        self._owner = owner

    def release(self) -> None:
        """Give the buffers back; ``pictures`` will be overwritten from now on."""
        self._owner._give_back(self.pictures)


class BatchLoader:
    """Decodes lists of images with threads, a bounded number of batches ahead, in order.

    Threads are enough: Pillow lets go of the interpreter lock while it decodes and resizes, and no
    pixel has to cross a process border. Use it as a context manager; leaving it stops the threads.

    Args:
        batches: the images of each batch, none longer than ``batch_size``; read lazily.
        preprocesses: what is made of each image; it is read and decoded once for all of them.
        batch_size: rows of every batch, whatever number of images it holds.
        workers: decoding threads, at least 1.
        pin: page-lock the buffers, so that copies to a CUDA device can run beside the computation.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[ImageSource]],
        preprocesses: Sequence[Preprocess],
        *,
        batch_size: int,
        workers: int,
        pin: bool = False,
    ) -> None:
        import torch

        self._plan = iter(batches)
        self._preprocesses = tuple(preprocesses)
        self._batch_size = batch_size
        shapes = [(batch_size, *preprocess.input_size, 3) for preprocess in preprocesses]
        self._free = [
            tuple(torch.empty(shape, dtype=torch.uint8, pin_memory=pin) for shape in shapes)
            for _ in range(BUFFERS)
        ]
        self._in_flight: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._planned = False  # the plan has no more batches
        self._closed = False
        self._broken: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"decode-{i}", daemon=True)
            for i in range(workers)
        ]

    def __enter__(self) -> BatchLoader:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order; each holds a buffer until it is released."""
        while True:
            with self._changed:
                self._changed.wait_for(self._first_is_decided)
                if self._broken is not None:
                    raise self._broken
                if not self._in_flight:
                    return
                batch = self._in_flight.popleft()
            yield batch

    def _first_is_decided(self) -> bool:
        if self._broken is not None:
            return True
        return self._in_flight[0]._pending == 0 if self._in_flight else self._planned

    def _give_back(self, pictures: tuple[torch.Tensor, ...]) -> None:
        with self._changed:
            self._free.append(pictures)
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while (claim := self._claim()) is not None:
                batch, position = claim
                outcome = self._decode(batch, position)
                with self._changed:
                    batch.outcomes[position] = outcome
                    batch._pending -= 1
                    if not batch._pending:
                        self._changed.notify_all()
        except BaseException as error:  # a fault of this program or of the plan, not of an image
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _claim(self) -> tuple[Batch, int] | None:
        """The next image that no thread has yet; waits for a free buffer to open a batch."""
        with self._changed:
            while True:
                if self._closed or self._broken is not None:
                    return None
                newest = self._in_flight[-1] if self._in_flight else None
                if newest is not None and newest._claimed < len(newest.outcomes):
                    newest._claimed += 1
                    return newest, newest._claimed - 1
                if self._planned:
                    return None
                if not self._free:
                    self._changed.wait()
                    continue
                self._open_batch()

    def _open_batch(self) -> None:
        sources = next(self._plan, None)
        if sources is None:
            self._planned = True
            self._changed.notify_all()
            return
        if not 0 < len(sources) <= self._batch_size:
            raise ValueError(f"a batch of {len(sources)} images, expected 1 to {self._batch_size}")
        self._in_flight.append(Batch(self._free.pop(), sources, self))

    def _decode(self, batch: Batch, position: int) -> ImageInfo | Failure:
        outs = [rows[position] for rows in batch._rows]
        try:
            return decode_into(batch._sources[position], self._preprocesses, outs)
        except DecodeError as error:
            for out in outs:
                out[...] = 0
            return Failure(error.reason, str(error), error.size, error.mtime_ns)
