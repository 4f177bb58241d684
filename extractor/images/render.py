"""From a decoded image to the picture of one model: resized, cropped or padded, and upright."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from extractor.images import resize
from extractor.images.orientation import stored_box, turn_upright
from extractor.images.types import StoredLayout
from extractor.preprocess import Geometry, Preprocess

__all__ = ["can_resize_whole", "render", "resize_and_crop_box"]

# The fast filter copies the image and resizes all of it. Pillow's filter needs no copy and resizes
# only the crop, so it takes over for large and for very long images.
MAX_COPIED_PIXELS = 2**23
MAX_SURPLUS = 8


def render(
    rgb: Image.Image,
    preprocess: Preprocess,
    out: npt.NDArray[np.uint8],
    layout: StoredLayout,
    reduced_by: int,
) -> None:
    """Resize, crop and turn an image into the picture of one model.

    Args:
        rgb: Decoded image in mode RGB, in the orientation of its file.
        preprocess: Transform of the model.
        out: ``(height, width, 3)`` uint8, the model's input size. Written in place.
        layout: Size and orientation of the image in its file.
        reduced_by: Factor by which ``rgb`` is smaller than ``layout`` along each edge.
    """
    geometry = preprocess.geometry(*layout.upright)
    visible = _resize_visible(rgb, preprocess.interpolation, geometry, layout, reduced_by)
    left, top = geometry.offset
    width, height = geometry.size
    if (height, width) != out.shape[:2]:
        out[...] = preprocess.fill
    upright = turn_upright(visible, layout.orientation)
    for channel in range(3):  # four times as fast as copying three of four bytes at once
        out[top : top + height, left : left + width, channel] = upright[..., channel]


def can_resize_whole(geometry: Geometry, interpolation: str) -> bool:
    """Return whether torch has the filter, and the crop keeps enough of the resized image."""
    surplus = math.prod(geometry.resized_size) / math.prod(geometry.size)
    return interpolation in resize.FILTERS and surplus <= MAX_SURPLUS


def resize_and_crop_box(
    geometry: Geometry, orientation: int
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Return the size to resize a stored image to, and the box to crop from the result.

    The size is (width, height); the box is (left, top, right, bottom). The crop is turned upright
    afterwards, which is much cheaper than turning a whole camera photo.
    """
    x, y = geometry.crop_offset
    crop = (x, y, x + geometry.size[0], y + geometry.size[1])
    size = geometry.resized_size[::-1] if orientation >= 5 else geometry.resized_size
    left, top, right, bottom = map(int, stored_box(crop, orientation, *size))
    return size, (left, top, right, bottom)


def _resize_visible(
    rgb: Image.Image,
    interpolation: str,
    geometry: Geometry,
    layout: StoredLayout,
    reduced_by: int,
) -> npt.NDArray[np.uint8]:
    """Return the resized part of an image that the model sees, in the orientation of its file."""
    width, height, orientation = layout
    fits = rgb.width * rgb.height <= MAX_COPIED_PIXELS
    if fits and can_resize_whole(geometry, interpolation) and resize.is_fast():
        size, (x0, y0, x1, y1) = resize_and_crop_box(geometry, orientation)
        scale = width / reduced_by / size[0], height / reduced_by / size[1]
        return resize.resize(rgb, size, scale, interpolation)[y0:y1, x0:x1]
    size = geometry.size[::-1] if orientation >= 5 else geometry.size
    left, top, right, bottom = stored_box(geometry.box, orientation, width, height)
    box = (left / reduced_by, top / reduced_by, right / reduced_by, bottom / reduced_by)
    return np.asarray(rgb.resize(size, Image.Resampling[interpolation.upper()], box=box))
