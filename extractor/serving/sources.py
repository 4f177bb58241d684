"""Images as callers hand them in: checked, and turned into sources for the decoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import IO, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from extractor.errors import UsageError
from extractor.images.types import EncodedImage, Failure, ImageSource

__all__ = ["AnyImage", "check_images"]

AnyImage: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | "
    "npt.NDArray[np.uint8]"
)
"""A path, an encoded image in memory or in a binary file, or a decoded image."""

_SINGLE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)


def check_images(images: Iterable[AnyImage]) -> list[ImageSource | Failure]:
    """Return the sources of several images, in order. Files are read, without closing them.

    A file that cannot be read is a failure.

    Raises:
        UsageError: A single image, a collection without order, or an object that is no image.
    """
    _check_several(images)
    return [_check_image(image, index) for index, image in enumerate(images)]


def _check_several(images: object) -> None:
    """Check that a value holds several images in an order of their own.

    Raises:
        UsageError: A single image, or a collection that is no list of images.
    """
    advice = ""
    if isinstance(images, Mapping):
        advice = "list(images.values())"
    elif isinstance(images, torch.Tensor):
        advice = "[images.permute(1, 2, 0).numpy()] for uint8 (3, H, W) on the CPU"
        if images.ndim > 3:
            advice = "list(images.permute(0, 2, 3, 1).numpy()) for uint8 (N, 3, H, W) on the CPU"
    elif isinstance(images, (set, frozenset)):
        advice = "sorted(images), since a set has no order"
    elif hasattr(images, "read"):
        advice = "[file]"
    elif isinstance(images, _SINGLE) or _is_one_array(images) or not isinstance(images, Iterable):
        advice = "[image]"
    if advice:
        count = "a single " if advice == "[image]" else ""
        raise UsageError(
            f"images: got {count}{type(images).__name__}, expected a list of images; try {advice}"
        )


def _is_one_array(images: object) -> bool:
    """Return whether an array of any library has too few axes for several images.

    One axis of strings or objects may be a list of paths.
    """
    axes = getattr(images, "ndim", None)
    kind = getattr(getattr(images, "dtype", None), "kind", "")
    return isinstance(axes, int) and axes < 4 and (axes != 1 or kind not in "OSU")


def _check_image(image: object, index: int) -> ImageSource | Failure:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return EncodedImage(bytes(image))
    if isinstance(image, (str, os.PathLike, Image.Image, np.ndarray)):
        return image
    if callable(read := getattr(image, "read", None)):
        try:
            content = read()
        except (OSError, ValueError) as error:  # ValueError: it is closed
            return Failure("unreadable", f"the file cannot be read: {error}")
        if isinstance(content, bytes):
            return EncodedImage(content)
        raise UsageError(
            f"image {index}: got a file that returns {type(content).__name__}, expected bytes; "
            'open it in binary mode, "rb"'
        )
    advice = "; try image.permute(1, 2, 0).numpy()" if isinstance(image, torch.Tensor) else ""
    raise UsageError(
        f"image {index}: got {type(image).__name__}, expected a path, bytes, a binary file, "
        f"a PIL image or a uint8 array{advice}"
    )
