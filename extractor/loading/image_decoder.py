"""Reading and decoding of one task, with all that guards against bad images."""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence

from extractor.errors import DecodeError
from extractor.images.budget import LargeImageSlot, PixelBudget
from extractor.images.decode import decode_into
from extractor.images.files import READ_WHOLE_BYTES, read_file
from extractor.images.jpeg import plain_jpeg
from extractor.images.types import Failure, ImageInfo, ReadFile
from extractor.loading.crash_log import CrashLog
from extractor.loading.options import LoaderOptions
from extractor.loading.subprocess_decode import decode_apart
from extractor.loading.task import Task, TaskBudget
from extractor.preprocess import Preprocess
from extractor.system.timing import Timer

__all__ = ["ImageDecoder"]

OBSERVED_READS = 2  # between two looks at how long Python's lock takes
KEPT_LOOKS = 15

MAX_ENCODED_BYTES = 2**30  # all images that wait for the GPU; further ones are decoded here


class ImageDecoder:
    """Reads and decodes images, one call per task. Safe to call from several threads.

    Args:
        preprocesses: Transforms; an image is decoded once for all of them.
        options: Options of the loader.
        suspects: Paths of files to decode in a child process. The caller may add to them.
        crash_log: Notes the files that are being decoded.
        timer: Sums the time of reading and decoding.

    Attributes:
        budget: Limit on the pixels of all threads.
        decode_mode: ``scaled``, ``exact`` or ``gpu``. May change while threads decode.
        encoded_bytes: Size of the images that wait for the GPU. Changed under the loader's lock.
    """

    def __init__(
        self,
        preprocesses: Sequence[Preprocess],
        options: LoaderOptions,
        suspects: Collection[bytes],
        crash_log: CrashLog | None,
        timer: Timer,
    ) -> None:
        slot = None
        if options.large_image_slot is not None:
            slot = LargeImageSlot(options.large_image_slot)
        self.budget = PixelBudget(options.max_pixels, options.pixel_share, slot)
        self.decode_mode = options.decode_mode
        self.encoded_bytes = 0
        self._preprocesses = tuple(preprocesses)
        self._timeout_seconds = options.image_timeout_seconds
        self._suspects = suspects
        self._one_child = threading.Lock()
        self._crash_log = crash_log
        self._timer = timer
        self._reads = itertools.count()
        self._waits: deque[float] = deque([0.0], KEPT_LOOKS)

    @property
    def lock_seconds(self) -> float:
        """Usual time to get Python's lock back after giving it away: the median of some looks."""
        return statistics.median(tuple(self._waits))

    def read(self, task: Task, max_bytes: int = READ_WHOLE_BYTES) -> Failure | None:
        """Read the file of a task if its source is a path. Return the failure, if any."""
        path = task.source
        if not isinstance(path, (str, bytes, os.PathLike)) or path in self._suspects:
            return None
        started = time.perf_counter()
        try:
            task.source = read_file(path, max_bytes)
        except DecodeError as error:
            return Failure.from_error(error)
        finally:
            self._timer.add("read", started, time.perf_counter() - started)
            if next(self._reads) % OBSERVED_READS == 0:
                started = time.perf_counter()
                time.sleep(0)
                self._waits.append(time.perf_counter() - started)
        return None

    def decode(self, task: Task, slot: int) -> ImageInfo | Failure:
        """Read a task if that was not done, and decode it into its rows.

        Args:
            task: Image to decode.
            slot: Slot of the crash log that belongs to the calling thread.
        """
        if (failure := self.read(task)) is not None:
            return failure
        started, used = time.perf_counter(), time.thread_time()
        try:
            if (info := self._leave_encoded(task)) is not None:
                return info
            if isinstance(task.origin, bytes) and task.origin in self._suspects:
                return self._decode_suspect(task, task.origin)
            budget = TaskBudget(self.budget, task)
            if not isinstance(task.origin, bytes) or self._crash_log is None:
                return decode_into(
                    task.source, self._preprocesses, task.outs, budget, self.decode_mode
                )
            self._crash_log.note(slot, task.origin)
            try:
                return decode_into(
                    task.source, self._preprocesses, task.outs, budget, self.decode_mode
                )
            finally:
                self._crash_log.note(slot, b"")
        except DecodeError as error:
            return Failure.from_error(error)
        finally:
            task.source = b""  # free the content
            lasted, used = time.perf_counter() - started, time.thread_time() - used
            self._timer.add("decode", started, lasted, counted=used)

    def _decode_suspect(self, task: Task, path: bytes) -> ImageInfo:
        """Decode an image in a child process, one at a time. The child has its own time limit."""
        with task.paused(), self._one_child:
            return decode_apart(
                path,
                self._preprocesses,
                task.outs,
                max_pixels=self.budget.max_pixels,
                decode_mode=self.decode_mode,
                timeout_seconds=self._timeout_seconds,
            )

    def _leave_encoded(self, task: Task) -> ImageInfo | None:
        """Leave an image for the GPU to decode, if that is wanted and possible."""
        if self.decode_mode != "gpu" or not isinstance(task.source, ReadFile):
            return None
        if self.encoded_bytes >= MAX_ENCODED_BYTES:  # images in other threads may still exceed it
            return None
        plain = plain_jpeg(task.source, self._preprocesses, self.budget.max_pixels)
        if plain is None:
            return None
        info, task.encoded = plain
        return info
