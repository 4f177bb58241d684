"""From decoded pixels to the picture that a model sees: resized, cropped or padded, upright."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from extractor.images import resize
from extractor.preprocess import Geometry, Preprocess

__all__ = ["Stored", "can_resize_whole", "draw", "whole_and_seen"]

# The fast filter takes a copy of the whole image, and resizes all of it. Pillow's needs no copy,
# and resizes only what the model sees: it is for images that are large or very long.
MAX_COPIED_PIXELS = 2**23
MAX_SURPLUS = 8


class Stored(NamedTuple):
    """How an image lies in its file: width and height in pixels, and how it is to be turned.

    ``orientation`` is that of EXIF (CIPA DC-008, tag 0x0112), 1 to 8; from 5 on the rows of the
    file are the columns of what one looks at.
    """

    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height as the image is looked at."""
        sideways = self.orientation >= 5
        return (self.height, self.width) if sideways else (self.width, self.height)


def draw(
    rgb: Image.Image,
    preprocess: Preprocess,
    out: npt.NDArray[np.uint8],
    stored: Stored,
    shrunk: int,
) -> None:
    """Draw the picture of one model.

    Args:
        rgb: the image in mode RGB, turned as it is stored.
        out: ``(height, width, 3)`` uint8 of the model's input, written in place.
        stored: what the file holds.
        shrunk: ``rgb`` is one part in so many of that, along each edge.
    """
    geometry = preprocess.geometry(*stored.upright)
    part = _part(rgb, preprocess.interpolation, geometry, stored, shrunk)
    left, top = geometry.at
    width, height = geometry.size
    if (height, width) != out.shape[:2]:
        out[...] = preprocess.fill
    upright = _upright(part, stored.orientation)
    for channel in range(3):  # a quarter of the time of copying three of four bytes at a time
        out[top : top + height, left : left + width, channel] = upright[..., channel]


def can_resize_whole(geometry: Geometry, interpolation: str) -> bool:
    """Whether torch's filter has it, and would not make far more than the model sees."""
    surplus = math.prod(geometry.whole) / math.prod(geometry.size)
    return interpolation in resize.FILTERS and surplus <= MAX_SURPLUS


def whole_and_seen(
    geometry: Geometry, orientation: int
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """(width, height) to resize a stored image to, and what the model sees of that.

    The latter as left, top, right and bottom. Turning the small picture is the same as turning the
    image, and much cheaper for camera photos.
    """
    x, y = geometry.corner
    seen = (x, y, x + geometry.size[0], y + geometry.size[1])
    whole = geometry.whole[::-1] if orientation >= 5 else geometry.whole
    left, top, right, bottom = map(int, _raw_box(seen, orientation, *whole))
    return whole, (left, top, right, bottom)


def _part(
    rgb: Image.Image, interpolation: str, geometry: Geometry, stored: Stored, shrunk: int
) -> npt.NDArray[np.uint8]:
    """What the model sees of an image, resized, but turned as it is stored."""
    width, height, orientation = stored
    fits = rgb.width * rgb.height <= MAX_COPIED_PIXELS
    if fits and resize.is_fast() and can_resize_whole(geometry, interpolation):
        whole, (x0, y0, x1, y1) = whole_and_seen(geometry, orientation)
        shares = width / shrunk / whole[0], height / shrunk / whole[1]
        return resize.resize(rgb, whole, shares, interpolation)[y0:y1, x0:x1]
    size = geometry.size[::-1] if orientation >= 5 else geometry.size
    left, top, right, bottom = _raw_box(geometry.box, orientation, width, height)
    box = (left / shrunk, top / shrunk, right / shrunk, bottom / shrunk)
    return np.asarray(rgb.resize(size, Image.Resampling[interpolation.upper()], box=box))


def _upright(part: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """A picture ``(H, W, 3)`` turned as its EXIF orientation says (CIPA DC-008, tag 0x0112)."""
    if orientation >= 5:
        part = part.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        part = part[:, ::-1]
    return part[::-1] if orientation in (3, 4, 7, 8) else part


def _raw_box(
    box: tuple[float, float, float, float], orientation: int, raw_width: int, raw_height: int
) -> tuple[float, float, float, float]:
    """The part of the stored image that ``box`` of the upright image comes from."""
    left, top, right, bottom = box
    if orientation >= 5:  # the stored rows are the upright image's columns
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
        left, right = raw_width - right, raw_width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = raw_height - bottom, raw_height - top
    return left, top, right, bottom
