"""Limits on the number of pixels that are decoded at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator

from PIL import Image

from extractor.errors import DecodeError

__all__ = ["LargeImageSlot", "PixelBudget", "allow_pixels", "pillow_allows"]


class LargeImageSlot:
    """Slot of this machine that one image at a time may take, in whichever process.

    It is a lock of a file, which the kernel releases when the process ends, in whatever way.

    Args:
        path: File to lock, on a local disk; made if it is missing. All processes name the same.

    Raises:
        OSError: The file cannot be opened, or its file system has no locks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self._file)
        self._one_thread = threading.Lock()  # the threads of a process share its lock of the file
        with contextlib.suppress(BlockingIOError):  # any other error is better raised now
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def take(self) -> None:
        """Wait until no other image has the slot, and take it."""
        self._one_thread.acquire()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except BaseException:
            self._one_thread.release()
            raise

    def give_back(self) -> None:
        """Free the slot. Any thread may do that."""
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._one_thread.release()


class PixelBudget:
    """Limit on the pixels that all decoding threads hold together.

    It bounds the memory of a run, whatever the files declare and however many threads decode.
    Several processes of one machine divide the pixels into shares. An image above the share of its
    process takes all of it, after it has waited for the slot of the machine.

    Args:
        max_pixels: Limit on the pixels of one image.
        share: Number of pixels that may be in decoders of this process at the same time;
            ``max_pixels`` if None.
        slot: Slot of images above the share.
    """

    def __init__(
        self, max_pixels: int, share: int | None = None, slot: LargeImageSlot | None = None
    ) -> None:
        self.max_pixels = max_pixels
        self._share = max_pixels if share is None else min(share, max_pixels)
        self._slot = slot
        self._left = self._share
        self._changed = threading.Condition()
        self._is_draining = False  # an image waits for the whole share, and others let it pass

    @contextlib.contextmanager
    def claim(self, width: int, height: int) -> Iterator[None]:
        """Wait until an image fits into the budget, and hold its pixels during the block.

        Raises:
            DecodeError: The image alone is larger than the budget.
        """
        pixels = width * height
        if pixels > self.max_pixels:
            raise DecodeError(
                "too-large",
                f"{width} x {height} are {pixels} pixels, and the limit is {self.max_pixels}; "
                "raise --max-pixels to decode it",
            )
        self.take(pixels)
        try:
            yield
        finally:
            self.give_back(pixels)

    def take(self, pixels: int) -> None:
        """Wait until so many pixels are free, and take them."""
        if pixels > self._share:
            self._take_share()
            return
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels and not self._is_draining)
            self._left -= pixels

    def give_back(self, pixels: int) -> None:
        """Free pixels that were taken."""
        with self._changed:
            self._left += min(pixels, self._share)
            self._changed.notify_all()
        if pixels > self._share and self._slot is not None:
            self._slot.give_back()

    def _take_share(self) -> None:
        if self._slot is not None:
            self._slot.take()  # first, so that smaller images go on meanwhile
        with self._changed:
            self._changed.wait_for(lambda: not self._is_draining)
            self._is_draining = True  # the whole machine waits for the slot
            self._changed.wait_for(lambda: self._left == self._share)
            self._is_draining = False
            self._left = 0


def allow_pixels(max_pixels: int) -> None:
    """Set Pillow's own limit, which also guards images nested in containers such as icons.

    Pillow's default is lower than ours. The setting belongs to the whole process, so programs call
    this and the library does not. See :func:`pillow_allows`.
    """
    Image.MAX_IMAGE_PIXELS = _pillow_limit(max_pixels)


def pillow_allows(max_pixels: int) -> contextlib.AbstractContextManager[None]:
    """Let Pillow open images of so many pixels during a block, if its own limit is lower.

    Blocks of several threads may overlap. After the last one, the limit is what the program set.
    """
    if _raised_limit.is_enough(_pillow_limit(max_pixels)):
        return _NOTHING_TO_DO  # counting costs up to one percent of decoding a photo
    return _raised_limit.to(max_pixels)


def _pillow_limit(max_pixels: int) -> int:
    return (max_pixels + 1) // 2  # Pillow refuses more than twice this number


class _RaisedLimit:
    """Pillow's own limit while threads decode; see :func:`pillow_allows`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._needed: Counter[int] = Counter()  # blocks by the limit that they need
        self._programs = self._ours = Image.MAX_IMAGE_PIXELS

    def is_enough(self, limit: int) -> bool:
        """Return whether the program's own limit is as high, without the help of any block."""
        current = Image.MAX_IMAGE_PIXELS
        return not self._needed and (current is None or current >= limit)

    @contextlib.contextmanager
    def to(self, max_pixels: int) -> Iterator[None]:
        limit = _pillow_limit(max_pixels)
        self._count(limit, 1)
        try:
            yield
        finally:
            self._count(limit, -1)

    def _count(self, limit: int, blocks: int) -> None:
        with self._lock:
            if self._ours != Image.MAX_IMAGE_PIXELS:  # the program set it meanwhile
                self._programs = Image.MAX_IMAGE_PIXELS
            self._needed[limit] += blocks
            if not self._needed[limit]:
                del self._needed[limit]
            self._ours = self._programs
            if self._programs is not None:
                self._ours = max(self._programs, *self._needed, 0)
            Image.MAX_IMAGE_PIXELS = self._ours


_raised_limit = _RaisedLimit()
_NOTHING_TO_DO = contextlib.nullcontext()
