"""Decoding threads that outlive a call, shared by all callers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from extractor.errors import DecodeError, SourceError
from extractor.images.budget import PixelBudget
from extractor.images.decode import decode_into
from extractor.images.types import Failure, ImageInfo, ImageSource
from extractor.preprocess import Preprocess
from extractor.system.running_clock import LOOK_SECONDS, running_seconds

__all__ = ["DecodeOptions", "DecodePool", "Decoded"]

# Each hanging decoder keeps a thread. So many of them mean that the disk hangs.
MAX_ABANDONED = 32

# Time that threads get to finish what they have when the pool is closed.
PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class DecodeOptions:
    """Options of a :class:`DecodePool`.

    Attributes:
        workers: Number of images that are decoded at a time.
        max_pixels: Limit on the pixels in all decoders together. A larger image fails.
        timeout_seconds: Time after which one of several images fails.
        decode_mode: ``scaled`` or ``exact``, see :func:`extractor.images.decode.decode_into`.
    """

    workers: int
    max_pixels: int
    timeout_seconds: float
    decode_mode: str


@dataclass(frozen=True)
class Decoded:
    """Pictures of several images.

    Attributes:
        pictures: For each transform ``(N, H, W, 3)`` uint8 RGB; rows of failed images are black.
        outcomes: For each image its facts, or why it cannot be decoded.
    """

    pictures: tuple[npt.NDArray[np.uint8], ...]
    outcomes: tuple[ImageInfo | Failure, ...]


class DecodePool:
    """Decodes images for many callers at a time.

    A single image is decoded in the caller's thread, so no thread has to wake up. Several images
    are decoded by threads that live until :meth:`close`. Both together decode at most
    ``options.workers`` images at a time.

    Args:
        preprocesses: Transforms; an image is decoded once for all of them.
        options: Number of threads and limits.
    """

    def __init__(self, preprocesses: Sequence[Preprocess], options: DecodeOptions) -> None:
        self._preprocesses = tuple(preprocesses)
        self._options = options
        self._budget = PixelBudget(options.max_pixels)
        self._slots = threading.Semaphore(options.workers)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.RLock()  # the garbage collector may close the pool anywhere
        self._threads: set[threading.Thread] = set()
        self._abandoned = 0
        self._is_closed = False

    def decode(self, sources: Sequence[ImageSource | Failure]) -> Decoded:
        """Decode images, in order. A failure among them stays one.

        Raises:
            SourceError: So many decoders hang that the disk must be the reason.
        """
        pictures = tuple(
            np.empty((len(sources), *preprocess.input_size, 3), np.uint8)
            for preprocess in self._preprocesses
        )
        jobs = [
            _Job(source, [rows[index] for rows in pictures]) for index, source in enumerate(sources)
        ]
        if len(jobs) == 1 or not self._hand_over(jobs):
            for job in jobs:
                job.run(self)
        outcomes = tuple(self._wait(job) for job in jobs)
        if any(job.is_abandoned for job in jobs):  # its thread may still write
            pictures = tuple(rows.copy() for rows in pictures)
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, Failure):
                for rows in pictures:
                    rows[index] = 0
        return Decoded(pictures, outcomes)

    def close(self) -> None:
        """End the threads once the queue is empty, and wait for them for a while."""
        with self._lock:
            self._is_closed = True
            ending = self._threads - {threading.current_thread()}
            for _ in self._threads:
                self._jobs.put(None)
            self._threads = set()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for thread in ending:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _hand_over(self, jobs: Sequence[_Job]) -> bool:
        """Put jobs into the queue of the threads; return False if these have ended."""
        with self._lock:  # no job may follow the end marks
            if self._is_closed:
                return False
            self._start_threads()
            for job in jobs:
                self._jobs.put(job)
        return True

    def _start_threads(self) -> None:
        """Start the threads that are missing. The caller holds the lock."""
        while len(self._threads) < self._options.workers and not self._is_closed:
            thread = threading.Thread(target=self._work, name="decode", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run(self)
            if job.is_abandoned:  # another thread took over
                return

    def decode_job(self, job: _Job) -> ImageInfo | Failure:
        """Decode the image of a job in the calling thread."""
        source = job.source
        if isinstance(source, Failure):
            job.is_decoded = True
            return source
        self._slots.acquire()
        job.thread = threading.current_thread()
        job.started = running_seconds()
        try:
            return decode_into(
                source, self._preprocesses, job.outs, self._budget, self._options.decode_mode
            )
        except DecodeError as error:
            return Failure.from_error(error)
        finally:
            with self._lock:
                job.is_decoded = True
                if not job.is_abandoned:
                    self._slots.release()

    def _wait(self, job: _Job) -> ImageInfo | Failure:
        timeout = self._options.timeout_seconds
        while not job.done.wait(
            min(max(job.started + timeout - running_seconds(), 0.001), timeout, LOOK_SECONDS)
        ):
            if running_seconds() - job.started >= timeout and self._abandon(job):
                return Failure("timeout", f"not decoded within {timeout:g} s")
        return job.outcome()

    def _abandon(self, job: _Job) -> bool:
        """Leave a hanging decoder to itself, and start another one; False if it just ended.

        Raises:
            SourceError: So many decoders hang that the disk must be the reason.
        """
        with self._lock:
            if job.is_decoded:
                return False
            job.is_abandoned = True
            self._abandoned += 1
            if self._abandoned > MAX_ABANDONED:
                raise SourceError(
                    f"{self._abandoned} images were not decoded in time; check the disk or the "
                    "network, or raise image_timeout"
                )
            if job.thread is not None:
                self._threads.discard(job.thread)
            self._start_threads()
        self._slots.release()
        return True


class _Job:
    """One image on its way through a thread."""

    def __init__(
        self, source: ImageSource | Failure, outs: Sequence[npt.NDArray[np.uint8]]
    ) -> None:
        self.source = source
        self.outs = outs
        self.started = float("inf")
        self.done = threading.Event()
        self.thread: threading.Thread | None = None
        self.is_decoded = False
        self.is_abandoned = False
        self._outcome: ImageInfo | Failure | BaseException | None = None

    def run(self, pool: DecodePool) -> None:
        """Decode the image, and keep what came of it."""
        try:
            self._outcome = pool.decode_job(self)
        except BaseException as error:  # raised again where the caller waits
            self._outcome = error
        self.done.set()

    def outcome(self) -> ImageInfo | Failure:
        """Return what came of the image, or raise what its decoder raised."""
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None  # done is set
        return self._outcome
