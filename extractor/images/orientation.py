"""EXIF orientation: reading the tag, and turning pictures and boxes (CIPA DC-008, tag 0x0112)."""

from __future__ import annotations

import struct
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["flipped_axes", "read_orientation", "stored_box", "turn_upright"]

EXIF_ORIENTATION = 0x0112

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 if it is missing or broken."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, EOFError, struct.error):
        return 1  # a photo with a broken EXIF block is still a photo
    return value if value in range(1, 9) else 1


def turn_upright(picture: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Return a view of a stored picture ``(H, W, 3)`` turned upright."""
    if orientation >= 5:
        picture = picture.swapaxes(0, 1)
    rows, columns = flipped_axes(orientation)
    if columns:
        picture = picture[:, ::-1]
    return picture[::-1] if rows else picture


def flipped_axes(orientation: int) -> tuple[bool, bool]:
    """Return whether to reverse the rows and the columns, after any swap of the two axes."""
    return orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)


def stored_box(box: Box, orientation: int, stored_width: int, stored_height: int) -> Box:
    """Return the box of the stored image that a box of the upright image comes from."""
    left, top, right, bottom = box
    if orientation >= 5:  # the stored rows are the columns of the upright image
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
        left, right = stored_width - right, stored_width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = stored_height - bottom, stored_height - top
    return left, top, right, bottom
