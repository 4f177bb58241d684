"""Images in order, decoded ahead by threads straight into a few reused batch buffers."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from extractor.errors import DecodeError, SourceError
from extractor.images.budget import PixelBudget
from extractor.images.decode import decode_into
from extractor.images.files import READ_WHOLE_BYTES, read_file
from extractor.images.jpeg import plain_jpeg
from extractor.images.types import EncodedJpeg, Failure, ImageInfo, ImageSource, ReadFile
from extractor.loading.crash_log import CrashLog
from extractor.loading.subprocess_decode import decode_apart
from extractor.options import Options
from extractor.system.timing import Timer

if TYPE_CHECKING:
    import torch

    from extractor.preprocess import Preprocess

_DEFAULT = Options()

__all__ = ["Batch", "BatchLoader"]

# One buffer is being filled, one is ready, one is on its way to the device, and one is slack for
# an image that takes long. More only costs memory: what bounds a run is a rate, not a queue. Where
# a CPU computes several batches at once, as many can be filled meanwhile, if they are small.
BUFFERS = 4
MORE_BUFFERS = 8
MORE_BUFFERS_BYTES = 2**28
# Decoders that hang and are left to themselves, each with its thread and a buffer. So many mean
# that it is the disk that hangs, and not the images.
MAX_ABANDONED = 32
# Where files come slowly, threads of their own read them ahead: so many that the decoding threads
# always find one. Larger files are left to these.
MAX_READERS = 32
READ_AHEAD_BYTES = 8 * 2**20
MAX_AHEAD_BYTES = 256 * 2**20  # of all files that wait to be decoded
MAX_ENCODED_BYTES = 2**30  # of all that are left to the device; the others are decoded here
SLOW_READ_SECONDS = 0.003
SLOW_READ_SHARE = 0.5  # of the time that decoding takes
OBSERVED = 16  # images between two looks at how slowly files come

# How long who computes waits for the decoding threads to leave their cores.
LAST_DECODE_SECONDS = 0.005
# What threads that still decode get to come to an end when a run does.
PATIENCE_SECONDS = 2.0


class Batch:
    """Decoded images of one forward pass, in the order in which they were asked for.

    Attributes:
        pictures: for each preprocessing ``(B, H, W, 3)`` uint8 RGB in host memory, B the fixed
            batch size. Rows of failed images and rows behind the last image are black. Valid until
            :meth:`release`.
        outcomes: for each image what it was, or why it has no pixels; at most B of them.
        encoded: images by their place that are left to be decoded by the device; black until then.
    """

    def __init__(
        self,
        pictures: tuple[torch.Tensor, ...],
        sources: Sequence[ImageSource],
        owner: BatchLoader,
    ):
        self.pictures = pictures
        self.outcomes: list[ImageInfo | Failure | None] = [None] * len(sources)
        self.encoded: dict[int, EncodedJpeg] = {}
        self._sources = sources
        self._rows: list[npt.NDArray[np.uint8]] = [picture.numpy() for picture in pictures]
        for rows in self._rows:
            rows[len(sources) :] = 0
        self._claimed = 0
        self._pending = len(sources)
        self._owner = owner

    def _leave_encoded(self, position: int, image: EncodedJpeg) -> None:
        self.encoded[position] = image
        self._owner._encoded_bytes += _bytes(image)

    def _settle(self, position: int, outcome: ImageInfo | Failure) -> None:
        self.outcomes[position] = outcome
        self._pending -= 1
        if isinstance(outcome, Failure) or position in self.encoded:
            for rows in self._rows:
                rows[position] = 0

    def _move(self, pictures: tuple[torch.Tensor, ...]) -> None:
        """Leave the buffers to a thread that may still write to them."""
        for picture, rows in zip(pictures, self._rows, strict=True):
            picture.numpy()[...] = rows
        self.pictures = pictures
        self._rows = [picture.numpy() for picture in pictures]

    @contextlib.contextmanager
    def alone_on(self, cores: int) -> Iterator[None]:
        """Let as many decoding threads rest meanwhile, once they are done with their images."""
        with self._owner._resting_for(cores):
            yield

    def decode_on_host(self) -> None:
        """Leave no more images to the device, in batches to come."""
        self._owner._how = "exact"

    def release(self) -> None:
        """Give the buffers back; ``pictures`` will be overwritten from now on."""
        self._owner._give_back(self.pictures, sum(map(_bytes, self.encoded.values())))
        self.encoded = {}


class _Task:
    """One image while a thread reads or decodes it."""

    def __init__(self, batch: Batch, position: int) -> None:
        self.batch = batch
        self.position = position
        self.given = batch._sources[position]
        self.outs = [rows[position] for rows in batch._rows]
        self.encoded: EncodedJpeg | None = None  # where it is left to the device
        self.claimed = 0  # pixels of the budget
        self._rows = batch._rows
        self.begun = time.monotonic()
        self.is_abandoned = False
        self.is_read_ahead = False

    @property
    def bytes_read(self) -> int:
        """Of its file, where that was read."""
        return len(self.given.content) if isinstance(self.given, ReadFile) else 0

    @contextlib.contextmanager
    def not_timed(self) -> Iterator[None]:
        """Let no time pass, while others are waited for."""
        self.begun = math.inf
        try:
            yield
        finally:
            self.begun = time.monotonic()

    def settle(self, outcome: ImageInfo | Failure) -> None:
        """Hand the image over; into new buffers where the batch has moved meanwhile."""
        if self.encoded is not None:
            self.batch._leave_encoded(self.position, self.encoded)
        if self._rows is not self.batch._rows:
            for out, rows in zip(self.outs, self.batch._rows, strict=True):
                rows[self.position] = out
        self.batch._settle(self.position, outcome)


class _TaskBudget(PixelBudget):
    """The budget of all threads as one image sees it: waiting for it is no hanging."""

    def __init__(self, shared: PixelBudget, task: _Task) -> None:
        self.max_pixels = shared.max_pixels  # all else is the shared one's
        self._shared = shared
        self._task = task

    def take(self, pixels: int) -> None:
        with self._task.not_timed():
            self._shared.take(pixels)
        self._task.claimed += pixels

    def give_back(self, pixels: int) -> None:
        if not self._task.is_abandoned:  # else it was given back then
            self._task.claimed -= pixels
            self._shared.give_back(pixels)


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
        max_pixels: that may be in decoders at a time; an image of more fails.
        image_timeout: seconds after which an image fails and its thread is left to itself.
        decode: ``scaled`` or ``exact``, see :func:`extractor.images.decode.decode_into`; ``gpu``
            leaves plain JPEGs encoded, and decodes all others exactly.
        suspects: paths of files that are decoded in a process of their own.
        crash_log: where threads note the files that they decode.
        timer: sums what reading and decoding take.

    Attributes:
        readers: threads that read ahead.

    Raises:
        SourceError: while it is iterated: so many decoders hang that it must be the disk.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[ImageSource]],
        preprocesses: Sequence[Preprocess],
        *,
        batch_size: int,
        workers: int,
        pin: bool = False,
        max_pixels: int = _DEFAULT.max_pixels,
        image_timeout: float = _DEFAULT.image_timeout,
        decode: str = _DEFAULT.decode,
        suspects: Collection[bytes] = (),
        crash_log: CrashLog | None = None,
        timer: Timer | None = None,
    ) -> None:
        self._plan = iter(batches)
        self._preprocesses = tuple(preprocesses)
        self._batch_size = batch_size
        self._pin = pin
        self._budget = PixelBudget(max_pixels)
        self._timeout = image_timeout
        self._how = decode
        self._suspects = frozenset(suspects)
        self._one_apart = threading.Lock()
        self._crash_log = crash_log
        self._free = [self._buffers() for _ in range(self._count_of_buffers())]
        self._in_flight: deque[Batch] = deque()
        self._tasks: set[_Task] = set()  # that threads are at
        self._ready: deque[_Task] = deque()  # that were read, and are not yet decoded
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # for who takes the batches
        self._claimable = threading.Condition(lock)  # for who waits for a free buffer
        self._decodable = threading.Condition(lock)  # for who waits for a file
        self._planned = False  # the plan has no more batches
        self._closed = False
        self._broken: BaseException | None = None
        self._abandoned = 0
        self._timer = timer or Timer()
        self._workers = workers
        self._slots = 0  # of decoding threads that were ever begun
        self._settled = 0
        self._ahead_bytes = 0  # of files that were read and not yet decoded
        self._encoded_bytes = 0  # of files that are left to the device
        self._decoding = 0  # images just now
        self._resting = 0  # decoding threads that leave their cores to others
        self.readers = 0
        self._threads = [self._decoder() for _ in range(workers)]

    def _decoder(self) -> threading.Thread:
        name, slot = f"decode-{self._slots}", self._slots
        self._slots += 1
        return threading.Thread(target=self._work, args=(slot,), name=name, daemon=True)

    def _reader(self) -> threading.Thread:
        return threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True)

    def _shapes(self) -> list[tuple[int, ...]]:
        return [(self._batch_size, *one.input_size, 3) for one in self._preprocesses]

    def _count_of_buffers(self) -> int:
        fit = MORE_BUFFERS_BYTES // sum(map(math.prod, self._shapes()))
        return BUFFERS if self._pin else min(max(fit, BUFFERS), MORE_BUFFERS)

    def _buffers(self) -> tuple[torch.Tensor, ...]:
        import torch

        pin = self._pin
        return tuple(torch.empty(s, dtype=torch.uint8, pin_memory=pin) for s in self._shapes())

    def __enter__(self) -> BatchLoader:
        # A list of their own: those that run already may begin others, which read ahead.
        for thread in list(self._threads):
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._wake_all()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for thread in list(self._threads):
            # One that hangs dies with the process; it holds what it writes to.
            thread.join(max(deadline - time.monotonic(), 0.01))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order; each holds a buffer until it is released."""
        while True:
            with self._changed:
                while not self._changed.wait_for(self._first_is_decided, self._until_timeout()):
                    self._abandon_late()
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

    def _until_timeout(self) -> float:
        now = time.monotonic()
        begun = min([now, *(task.begun for task in self._tasks)])
        return max(begun + self._timeout - now, 0.0) + 0.001

    def _abandon_late(self) -> None:
        """Give up what takes too long: the image fails, and another thread takes over."""
        now = time.monotonic()
        for task in [task for task in self._tasks if now - task.begun >= self._timeout]:
            self._tasks.discard(task)
            task.is_abandoned = True
            self._budget.give_back(task.claimed)
            self._abandoned += 1
            if self._abandoned > MAX_ABANDONED:
                self._broken = SourceError(
                    f"{self._abandoned} images were not read and decoded within {self._timeout:g} "
                    "s each; see whether their disk answers, or raise --image-timeout"
                )
                return
            task.batch._move(self._buffers())
            told = f"not decoded within {self._timeout:g} s"
            task.batch._settle(task.position, Failure("timeout", told, *_stat(task)))
            self._decoding -= not task.is_read_ahead
            self._threads.append(self._reader() if task.is_read_ahead else self._decoder())
            self._threads[-1].start()

    @contextlib.contextmanager
    def _resting_for(self, cores: int) -> Iterator[None]:
        with self._changed:
            self._resting += cores
        try:
            with self._changed:
                # Who computes beside those that still decode loses more than by waiting for them.
                self._changed.wait_for(self._rests, LAST_DECODE_SECONDS)
            yield
        finally:
            with self._changed:
                self._resting -= cores
                self._claimable.notify_all()

    def _rests(self) -> bool:
        return self._closed or self._decoding <= max(self._workers - self._resting, 0)

    def _wake_all(self) -> None:
        for condition in (self._changed, self._claimable, self._decodable):
            condition.notify_all()

    def _give_back(self, pictures: tuple[torch.Tensor, ...], encoded_bytes: int) -> None:
        with self._changed:
            self._encoded_bytes -= encoded_bytes
            self._free.append(pictures)
            self._claimable.notify_all()

    # -- threads that decode

    def _work(self, slot: int) -> None:
        with self._faults_told() as current:
            while (task := self._claim_decodable()) is not None:
                current.append(task)
                outcome = self._decode(task, slot)
                with self._changed:
                    if task.is_abandoned:
                        return
                    self._decoding -= 1
                    self._settle(task, outcome)
                    if self._resting:
                        self._changed.notify_all()
                current.clear()

    @contextlib.contextmanager
    def _faults_told(self) -> Iterator[list[_Task]]:
        """Tell who takes the batches of a fault of this program or of the plan."""
        current: list[_Task] = []
        try:
            yield current
        except BaseException as error:
            with self._changed:
                if not any(task.is_abandoned for task in current):
                    self._broken = error
                    self._wake_all()

    def _settle(self, task: _Task, outcome: ImageInfo | Failure) -> None:
        self._tasks.discard(task)
        task.settle(outcome)
        if not task.batch._pending:
            self._changed.notify_all()
        self._settled += 1
        if self._settled % OBSERVED == 0:
            self._observe()

    def _observe(self) -> None:
        """Begin threads that read ahead, if files come slowly."""
        read, decode = (self._timer.seconds[kind] / self._settled for kind in ("read", "decode"))
        if read < max(SLOW_READ_SECONDS, SLOW_READ_SHARE * decode) or self._closed:
            return
        wanted = min(math.ceil(self._workers * read / max(decode, 1e-6)), MAX_READERS)
        for _ in range(wanted - self.readers):
            self.readers += 1
            self._threads.append(self._reader())
            self._threads[-1].start()

    def _claim_decodable(self) -> _Task | None:
        """The next image for a decoding thread: one that was read, or any where none is."""
        with self._changed:
            while True:
                if self._closed or self._broken is not None:
                    return None
                if self._decoding >= self._workers - self._resting:
                    self._claimable.wait()
                    continue
                if self._ready:
                    self._decoding += 1
                    task = self._ready.popleft()
                    task.is_read_ahead = False
                    if self._ahead_bytes >= MAX_AHEAD_BYTES:
                        self._claimable.notify_all()
                    self._ahead_bytes -= task.bytes_read
                    task.begun = time.monotonic()
                    self._tasks.add(task)
                    return task
                if self.readers:
                    if self._planned and not self._unread():
                        return None
                    self._decodable.wait()
                elif self._can_claim():
                    self._decoding += 1
                    return self._claim()
                elif self._planned:
                    return None
                else:
                    self._claimable.wait()

    def _unread(self) -> bool:
        """Whether there is an image that some thread will have read."""
        newest = self._in_flight[-1] if self._in_flight else None
        unclaimed = newest is not None and newest._claimed < len(newest.outcomes)
        return unclaimed or any(task.is_read_ahead for task in self._tasks)

    def _can_claim(self) -> bool:
        """Whether an image is left that no thread has; opens a batch where there is room."""
        while True:
            newest = self._in_flight[-1] if self._in_flight else None
            if newest is not None and newest._claimed < len(newest.outcomes):
                return True
            if self._planned or not self._free:
                return False
            self._open_batch()

    def _claim(self) -> _Task:
        newest = self._in_flight[-1]
        newest._claimed += 1
        task = _Task(newest, newest._claimed - 1)
        self._tasks.add(task)
        return task

    # -- threads that read ahead

    def _read_ahead(self) -> None:
        with self._faults_told() as current:
            while (task := self._claim_unread()) is not None:
                current.append(task)
                failure = self._read(task, READ_AHEAD_BYTES)
                with self._changed:
                    if task.is_abandoned:
                        return
                    if failure is None:
                        self._tasks.discard(task)
                        self._ready.append(task)
                        self._ahead_bytes += task.bytes_read
                        self._decodable.notify()
                    else:
                        self._settle(task, failure)
                        self._decodable.notify_all()  # it may have been the last
                current.clear()

    def _claim_unread(self) -> _Task | None:
        with self._changed:
            while True:
                if self._closed or self._broken is not None:
                    return None
                if self._ahead_bytes < MAX_AHEAD_BYTES:
                    if self._can_claim():
                        task = self._claim()
                        task.is_read_ahead = True
                        return task
                    if self._planned:
                        self._decodable.notify_all()
                        return None
                self._claimable.wait()

    def _read(self, task: _Task, most: int = READ_WHOLE_BYTES) -> Failure | None:
        """Read the file of a task, where it is one; why that cannot be done."""
        path = task.given
        if not isinstance(path, (str, bytes, os.PathLike)) or path in self._suspects:
            return None
        begun = time.perf_counter()
        try:
            task.given = read_file(path, most)
        except DecodeError as error:
            return Failure(error.reason, str(error), error.size, error.mtime_ns)
        finally:
            self._timer.add("read", begun, time.perf_counter() - begun)
        return None

    def _open_batch(self) -> None:
        sources = next(self._plan, None)
        if sources is None:
            self._planned = True
            self._wake_all()
            return
        if not 0 < len(sources) <= self._batch_size:
            raise ValueError(f"a batch of {len(sources)} images, expected 1 to {self._batch_size}")
        self._in_flight.append(Batch(self._free.pop(), sources, self))

    def _decode(self, task: _Task, slot: int) -> ImageInfo | Failure:
        path = task.batch._sources[task.position]
        if (failure := self._read(task)) is not None:
            return failure
        begun, used = time.perf_counter(), time.thread_time()
        try:
            if (left := self._leave_encoded(task)) is not None:
                return left
            if isinstance(path, bytes) and path in self._suspects:
                with task.not_timed(), self._one_apart:  # it has a clock of its own
                    return decode_apart(
                        path,
                        self._preprocesses,
                        task.outs,
                        max_pixels=self._budget.max_pixels,
                        decode_mode=self._how,
                        timeout_seconds=self._timeout,
                    )
            budget = _TaskBudget(self._budget, task)
            if not isinstance(path, bytes) or self._crash_log is None:
                return decode_into(task.given, self._preprocesses, task.outs, budget, self._how)
            self._crash_log.note(slot, path)
            try:
                return decode_into(task.given, self._preprocesses, task.outs, budget, self._how)
            finally:
                self._crash_log.note(slot, b"")
        except DecodeError as error:
            return Failure(error.reason, str(error), error.size, error.mtime_ns)
        finally:
            task.given = b""  # its bytes are not needed any more
            lasted, used = time.perf_counter() - begun, time.thread_time() - used
            self._timer.add("decode", begun, lasted, counted=used)

    def _leave_encoded(self, task: _Task) -> ImageInfo | None:
        """Leave an image to the device, where that is wanted and can be."""
        if self._how != "gpu" or not isinstance(task.given, ReadFile):
            return None
        if self._encoded_bytes >= MAX_ENCODED_BYTES:  # what threads are at just now may go beyond
            return None
        found = plain_jpeg(task.given, self._preprocesses, self._budget.max_pixels)
        if found is None:
            return None
        info, task.encoded = found
        return info


def _bytes(image: EncodedJpeg) -> int:
    return len(image.file.content)


def _stat(task: _Task) -> tuple[int, int]:
    source = task.batch._sources[task.position]
    if isinstance(task.given, ReadFile):
        return task.given.size, task.given.mtime_ns
    if isinstance(source, (str, bytes, os.PathLike)):
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(source)
            return status.st_size, status.st_mtime_ns
    return -1, -1
