"""Limits on the number of pixels that are decoded at the same time."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

from PIL import Image

from extractor.errors import DecodeError

__all__ = ["PixelBudget", "allow_pixels", "pillow_allows"]


class PixelBudget:
    """Limit on the pixels that all decoding threads hold together.

    It bounds the memory of a run, whatever the files declare and however many threads decode.

    Args:
        max_pixels: Number of pixels that may be in decoders at the same time.
    """

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._left = max_pixels
        self._changed = threading.Condition()

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
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels

    def give_back(self, pixels: int) -> None:
        """Free pixels that were taken."""
        with self._changed:
            self._left += pixels
            self._changed.notify_all()


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
