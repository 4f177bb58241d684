"""Batches of decoded images in order, decoded ahead by threads into a few reused buffers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from extractor.errors import SourceError
from extractor.images.types import Failure, ImageInfo, ImageSource
from extractor.loading.batch import Batch
from extractor.loading.buffers import BufferPool
from extractor.loading.crash_log import CrashLog
from extractor.loading.gate import Gate
from extractor.loading.image_decoder import ImageDecoder
from extractor.loading.options import LoaderOptions
from extractor.loading.read_ahead import MAX_FILE_BYTES, ReadAhead
from extractor.loading.task import Task, TaskBudget
from extractor.loading.task_queue import TaskQueue
from extractor.loading.watchdog import Watchdog
from extractor.system.running_clock import LOOK_SECONDS, running_seconds
from extractor.system.timing import Timer

if TYPE_CHECKING:
    from extractor.preprocess import Preprocess

__all__ = ["BatchLoader"]

# Time that threads get to finish their images when the loader is left.
PATIENCE_SECONDS = 2.0


class BatchLoader:
    """Decodes batches of images with threads, a bounded number of batches ahead, in order.

    Threads are enough: Pillow releases the interpreter lock while it decodes and resizes, and no
    pixel has to cross a process border. Use it as a context manager; leaving it stops the threads.

    All parts share one lock: queue, buffers, gate, read-ahead and watchdog are only used with it.
    Only reading and decoding happen without it.

    Args:
        batches: Images of each batch, none longer than the batch size; read lazily.
        preprocesses: Transforms; an image is read and decoded once for all of them.
        options: Batch size, number of threads, limits.
        suspects: Paths of files to decode in a child process.
        crash_log: Notes the files that are being decoded.
        timer: Sums the time of reading and decoding.

    Raises:
        SourceError: During iteration, if so many decoders hang that the disk must be the reason.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[ImageSource]],
        preprocesses: Sequence[Preprocess],
        options: LoaderOptions,
        suspects: Collection[bytes] = (),
        crash_log: CrashLog | None = None,
        timer: Timer | None = None,
    ) -> None:
        self._timeout_seconds = options.image_timeout_seconds
        self._timer = timer or Timer()
        self._decoder = ImageDecoder(preprocesses, options, suspects, crash_log, self._timer)
        lock = threading.Lock()
        self._progress = threading.Condition(lock)  # the caller waits for a complete batch
        self._claimable = threading.Condition(lock)  # threads wait for a buffer, or for the gate
        self._decodable = threading.Condition(lock)  # decoding threads wait for a file
        self._buffers = BufferPool(preprocesses, options)
        self._queue = TaskQueue(
            iter(batches), options.batch_size, self._buffers, self, self._wake_all
        )
        self._watchdog = Watchdog(self._timeout_seconds)
        self._gate = Gate(options.workers, self._progress, self._claimable)
        self._ahead = ReadAhead(options.workers)
        self._is_closed = False
        self._error: BaseException | None = None
        self._slots = 0  # decoding threads that were ever started
        self._threads = [self._new_decoding_thread() for _ in range(options.workers)]

    @property
    def readers(self) -> int:
        """Number of threads that read ahead."""
        return self._ahead.readers

    def __enter__(self) -> BatchLoader:
        """Start the decoding threads."""
        for thread in list(self._threads):  # a copy: threads that run may add readers
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all threads. A thread that hangs dies with the process."""
        with self._progress:
            self._is_closed = True
            self._wake_all()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for thread in list(self._threads):
            thread.join(max(deadline - time.monotonic(), 0.01))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order. Each holds a buffer until it is released."""
        while True:
            with self._progress:
                while not self._progress.wait_for(
                    self._is_decided, min(self._watchdog.seconds_until_late(), LOOK_SECONDS)
                ):
                    self._abandon_late()
                if self._error is not None:
                    raise self._error
                batch = self._queue.pop_first()
            if batch is None:
                return
            yield batch

    def _is_decided(self) -> bool:
        return self._error is not None or self._queue.is_first_decided

    def _abandon_late(self) -> None:
        """Fail the late images, and replace their threads."""
        try:
            for task in self._watchdog.abandon_late():
                self._replace(task)
        except SourceError as error:
            self._error = error

    def _replace(self, task: Task) -> None:
        TaskBudget(self._decoder.budget, task).give_back_all()
        task.batch.move_to(self._buffers.allocate())
        message = f"not decoded within {self._timeout_seconds:g} s"
        task.batch.settle(task.index, Failure("timeout", message, *task.file_status()))
        if task.is_read_ahead:
            self._start(self._new_reading_thread())
        else:
            self._gate.leave()
            self._start(self._new_decoding_thread())

    # -- called by batches

    def release(self, batch: Batch) -> None:
        """Take back the buffers of a batch."""
        with self._claimable:
            self._decoder.encoded_bytes -= batch.encoded_bytes
            self._buffers.give_back(batch.pictures)
            self._claimable.notify_all()

    def resting(self, cores: int) -> AbstractContextManager[None]:
        """Let as many decoding threads rest during a block."""
        return self._gate.resting(cores)

    def decode_on_host(self) -> None:
        """Leave no more images encoded for the GPU."""
        self._decoder.decode_mode = "exact"

    # -- threads

    def _new_decoding_thread(self) -> threading.Thread:
        slot = self._slots
        self._slots += 1
        return threading.Thread(
            target=self._decode_images, args=(slot,), name=f"decode-{slot}", daemon=True
        )

    def _new_reading_thread(self) -> threading.Thread:
        return threading.Thread(target=self._read_images, name="read-ahead", daemon=True)

    def _start(self, thread: threading.Thread) -> None:
        self._threads.append(thread)
        thread.start()

    def _wake_all(self) -> None:
        for condition in (self._progress, self._claimable, self._decodable):
            condition.notify_all()

    @contextlib.contextmanager
    def _errors_to_caller(self) -> Iterator[list[Task]]:
        """Raise errors of the block where the batches are iterated, unless its task is abandoned.

        Yields:
            A list in which the block keeps its current task.
        """
        current: list[Task] = []
        try:
            yield current
        except BaseException as error:
            with self._progress:
                if not any(task.is_abandoned for task in current):
                    self._error = error
                    self._wake_all()

    def _should_stop(self) -> bool:
        return self._is_closed or self._error is not None

    def _settle(self, task: Task, outcome: ImageInfo | Failure) -> None:
        """Record an outcome, and start reading threads if the disk is slow."""
        self._watchdog.forget(task)
        if task.encoded is not None:
            self._decoder.encoded_bytes += len(task.encoded.file.content)
        task.settle(outcome)
        if task.batch.is_complete:
            self._progress.notify_all()
        if self._ahead.count_image() and not self._is_closed:
            seconds = self._timer.seconds
            missing = self._ahead.missing_readers(
                seconds["read"], seconds["decode"], self._decoder.lock_seconds
            )
            for _ in range(missing):
                self._start(self._new_reading_thread())

    def _decode_images(self, slot: int) -> None:
        with self._errors_to_caller() as current:
            while (task := self._claim_to_decode()) is not None:
                current.append(task)
                outcome = self._decoder.decode(task, slot)
                with self._progress:
                    if task.is_abandoned:
                        return
                    self._settle(task, outcome)
                    self._gate.leave()
                current.clear()

    def _claim_to_decode(self) -> Task | None:
        """Wait for the next image to decode: one that was read ahead, or else the next of the plan.

        Returns:
            None if there will be no more images.
        """
        with self._progress:
            while not self._should_stop():
                if not self._gate.is_open:
                    self._claimable.wait()
                elif self._ahead:
                    return self._enter(self._take_read())
                elif self._ahead.readers:
                    # Only the readers claim from now on, so that files are read in order.
                    if self._queue.is_exhausted and not self._is_reading():
                        return None
                    self._decodable.wait()
                elif self._queue.prepare_next():
                    return self._enter(self._queue.claim())
                elif self._queue.is_exhausted:
                    return None
                else:
                    self._claimable.wait()
            return None

    def _enter(self, task: Task) -> Task:
        self._gate.enter()
        self._watchdog.watch(task)
        return task

    def _take_read(self) -> Task:
        if self._ahead.is_full:
            self._claimable.notify_all()
        task = self._ahead.pop()
        task.is_read_ahead = False
        task.started = running_seconds()
        return task

    def _is_reading(self) -> bool:
        """Return whether a reading thread has an image, or will claim one."""
        return self._queue.has_unclaimed or self._watchdog.is_reading_ahead

    def _read_images(self) -> None:
        with self._errors_to_caller() as current:
            while (task := self._claim_to_read()) is not None:
                current.append(task)
                failure = self._decoder.read(task, MAX_FILE_BYTES)
                with self._progress:
                    if task.is_abandoned:
                        return
                    if failure is None:
                        self._watchdog.forget(task)
                        self._ahead.push(task)
                        self._decodable.notify()
                    else:
                        self._settle(task, failure)
                        self._decodable.notify_all()  # it may have been the last image
                current.clear()

    def _claim_to_read(self) -> Task | None:
        with self._progress:
            while not self._should_stop():
                if not self._ahead.is_full:
                    if self._queue.prepare_next():
                        task = self._queue.claim()
                        task.is_read_ahead = True
                        self._watchdog.watch(task)
                        return task
                    if self._queue.is_exhausted:
                        self._decodable.notify_all()
                        return None
                self._claimable.wait()
            return None
