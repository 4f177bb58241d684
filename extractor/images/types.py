"""Values that pass between the stages of decoding, from a source to an outcome."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from extractor.errors import DecodeError

__all__ = [
    "EncodedImage",
    "EncodedJpeg",
    "Failure",
    "FilePath",
    "ImageInfo",
    "ImageSource",
    "ReadFile",
    "StoredLayout",
]

FilePath: TypeAlias = "str | bytes | os.PathLike[str]"
"""Path of a file. Bytes are allowed because not every file name is valid text."""

ImageSource: TypeAlias = "FilePath | ReadFile | EncodedImage | Image.Image | npt.NDArray[np.uint8]"
"""A path, the content of a file, an encoded image in memory, or a decoded image."""


@dataclass(frozen=True)
class EncodedImage:
    """Content of an image file in memory. The type tells it apart from a path given as bytes."""

    data: bytes


@dataclass(frozen=True)
class ReadFile:
    """Content of an image file with its path, size in bytes and modification time."""

    path: FilePath
    content: bytes
    size: int
    mtime_ns: int


class StoredLayout(NamedTuple):
    """Width, height and orientation of an image as its file stores it.

    ``orientation`` is the value of the EXIF tag, 1 to 8 (CIPA DC-008, tag 0x0112). From 5 on, the
    rows of the file are the columns of the upright image.
    """

    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        sideways = self.orientation >= 5
        return (self.height, self.width) if sideways else (self.width, self.height)


@dataclass(frozen=True)
class EncodedJpeg:
    """A JPEG file that a GPU may decode, and the layout of its image."""

    file: ReadFile
    layout: StoredLayout


@dataclass(frozen=True)
class ImageInfo:
    """Facts about an image that was decoded.

    Attributes:
        size: Size of the file in bytes, -1 if there is no file.
        mtime_ns: Modification time of the file, -1 if there is no file.
        width: Width of the upright image in pixels.
        height: Height of the upright image in pixels.
        sha256: Digest of the file, empty if there is no file.
    """

    size: int
    mtime_ns: int
    width: int
    height: int
    sha256: bytes = b""


@dataclass(frozen=True)
class Failure:
    """Reason why an image has no row.

    A value instead of the exception, whose traceback would keep whole images in memory.

    Attributes:
        reason: Short word for programs, such as ``truncated``.
        message: Sentence for people.
        size: Size of the file in bytes, -1 if there is no file.
        mtime_ns: Modification time of the file, -1 if there is no file.
    """

    reason: str
    message: str
    size: int = -1
    mtime_ns: int = -1

    @classmethod
    def from_error(cls, error: DecodeError) -> Failure:
        """Return the failure that an error describes, without its traceback."""
        return cls(error.reason, str(error), error.size, error.mtime_ns)
