"""Limits on the number of pixels that are decoded at the same time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from PIL import Image

from extractor.errors import DecodeError

__all__ = ["PixelBudget", "allow_pixels"]


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
    this and the library does not.
    """
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2  # Pillow refuses more than twice this number
